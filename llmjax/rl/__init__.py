"""After pretraining: rewards, preferences, policies and distillation, as pure functions and one loop's parts."""
