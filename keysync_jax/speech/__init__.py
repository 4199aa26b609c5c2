"""Speech encoders, one file each."""
