"""Raw videos to curated training shards, and the synthetic talkers."""
