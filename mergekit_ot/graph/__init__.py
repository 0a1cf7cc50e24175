"""The graph IR and what finds it: knows networks, and nothing of transport."""
