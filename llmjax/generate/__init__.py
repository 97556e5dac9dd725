"""KV cache, prefill, decode, sampling, streaming."""
