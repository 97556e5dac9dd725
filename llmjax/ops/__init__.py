"""Pure math: attention, position encodings, norms, losses, matrix products, experts, sampling."""
