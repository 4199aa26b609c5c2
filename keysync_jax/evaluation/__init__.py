"""Measures and their reports."""
