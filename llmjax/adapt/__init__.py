"""Adapters (LoRA, rsLoRA, DoRA) and quantized frozen weights: transformations of parameter trees."""
