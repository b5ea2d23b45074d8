"""Slow and obvious: what the measures are compared with."""
