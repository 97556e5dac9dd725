"""PPO with a value head, on the same prompts as configs/rl/sums_grpo.py."""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.data = dict(sources={'data/sums_prompts': 1.0}, seq_len=16)
  c.train = dict(init_from='runs/sums', steps=120, batch_size=128, log_every=10, eval_every=60,
                 compute_dtype='float32')
  c.optimizer = dict(lr=1e-3, schedule='linear', weight_decay=0.0)
  c.rl = dict(prompts_per_iteration=256, num_generations=1, max_new_tokens=4,
              rewards={'math': 1.0}, epochs=2, kl_coef=0.005)
  c.policy = dict(name='ppo', value_coef=0.5)
  c.evaluate = dict(limit=100)
  return c
