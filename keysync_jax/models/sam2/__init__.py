"""SAM 2.1 (Ravi et al., 2024) under the names of its published checkpoints: objects followed through a video from clicks and boxes."""
