"""The thin loops: prepare, pretrain, evaluate, generate, doctor, and their harness."""
