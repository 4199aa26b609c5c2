"""Recipes: one ml_collections file each, resolved by name."""
