"""Perplexity, bits per byte, compressor baselines, the report."""
