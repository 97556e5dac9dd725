"""Perplexity, bits per byte, held-out preferences, compressor baselines."""
