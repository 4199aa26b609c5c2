"""What a run leaves in its working directory: checkpoints, checksums, logs."""
