"""Many processes: launching them here and on clusters, supervising them, and disturbing them on purpose."""
