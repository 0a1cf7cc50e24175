"""The report of a fusion: a page to read and to send."""
