"""Mesh and placement over devices."""
