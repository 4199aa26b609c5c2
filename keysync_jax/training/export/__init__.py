"""A run as a model directory, with its card."""
