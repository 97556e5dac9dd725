"""The fifth stage of tools/lifecycle.sh: GRPO with the same initial model and problems as PPO."""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.data = dict(sources={'runs/lifecycle/data/problems': 1.0}, seq_len=52)
  c.train = dict(init_from='runs/lifecycle/sft', steps=160, batch_size=128, log_every=2, eval_every=40,
                 checkpoint_every=40, compute_dtype='float32')
  c.optimizer = dict(name='muon', lr=8e-4, warmup_steps=8, schedule='linear', weight_decay=0.0)
  c.rl = dict(prompts_per_iteration=64, num_generations=4, max_new_tokens=16, rewards={'math': 1.0})
  c.policy = dict(name='grpo', kl_coef=0.01)
  c.evaluate = dict(limit=360)
  return c
