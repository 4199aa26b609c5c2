"""Speech encoders: one file for each, which holds all that the system knows of that encoder; `registry` finds them by name."""
