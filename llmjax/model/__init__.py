"""Language models as values: `Model`, built from a `ModelSpec`."""
