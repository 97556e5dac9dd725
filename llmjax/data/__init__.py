"""From text to batches: sources, TFDS builders, token store, packing, the batch stream."""
