"""The verb `demo`: a drawn clip, dubbed and judged."""
