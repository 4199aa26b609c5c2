"""Names of weights: which torch tensor is which parameter, and how their layouts differ."""
