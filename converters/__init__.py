"""Weights in and out: one table of parameter names, both directions."""
