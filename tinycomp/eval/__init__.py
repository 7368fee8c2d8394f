"""Measurement: quality under named protocols, sizes, speed, and the report that shows them together."""
