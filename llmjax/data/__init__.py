"""From text to batches: sources, records, token store, packing, the batch stream."""
