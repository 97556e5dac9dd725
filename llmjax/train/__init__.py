"""TrainState, optimizers, schedules, and the one train step."""
