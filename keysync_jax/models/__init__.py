"""Flax modules: shapes in, shapes out."""
