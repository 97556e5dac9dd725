"""Language models: `Model`, built from a `ModelSpec`."""
