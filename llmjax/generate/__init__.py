"""Text generation: prefill and decoding with a KV cache, sampling, streaming, scoring."""
