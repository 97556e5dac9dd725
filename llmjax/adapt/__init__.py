"""Parameters to parameters: adapters (LoRA, rsLoRA, DoRA) and quantised frozen weights."""
