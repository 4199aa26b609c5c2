"""The real world in NumPy: video by timestamp, audio, faces, masks, compositing. Knows no JAX."""
