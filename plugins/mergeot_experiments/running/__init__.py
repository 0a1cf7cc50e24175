"""Fuses and scores what an order asks for, and keeps every measurement."""
