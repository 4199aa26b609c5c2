"""EDM mathematics as pure functions on arrays: no weights, no files."""
