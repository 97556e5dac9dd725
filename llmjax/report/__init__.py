"""Pages about runs, comparisons and plans."""
