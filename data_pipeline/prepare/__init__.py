"""From raw videos to training shards: curation, features and writing as restartable Apache Beam jobs (docs/prepare.md)."""
