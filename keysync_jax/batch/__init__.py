"""Many dubs as one job: a list of items, a ledger that loses none, workers that may die."""
