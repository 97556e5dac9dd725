"""One run: the training loop, what it does at intervals, and the run's folder."""
