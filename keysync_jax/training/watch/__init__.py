"""What a person sees of a run: metrics, validation, sample pictures."""
