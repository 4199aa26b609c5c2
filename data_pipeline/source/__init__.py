"""Reading training windows from prepared shards: which window comes when, what is in it, and batches through Grain."""
