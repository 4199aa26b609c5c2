"""What a traced program costs: FLOPs and activations. Imports JAX only."""
