"""The functional transformer: specs, leaf layers, Block, the decoder, presets, counts."""
