"""The trainer: objective, optimizer, step, loop, checkpoints and what a person sees of them."""
