"""Post-training: preference, reward, policy-gradient and distillation losses, rollouts, rewards, AI feedback."""
