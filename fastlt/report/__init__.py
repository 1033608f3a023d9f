"""Runs compared: a table for the terminal, and a page with figures that opens without a network."""
