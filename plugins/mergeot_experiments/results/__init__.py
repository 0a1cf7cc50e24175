"""From stored measurements to tables, and from tables to a page."""
