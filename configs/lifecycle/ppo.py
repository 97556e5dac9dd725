"""The fourth stage of tools/lifecycle.sh: PPO on word problems whose answers can be checked."""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.data = dict(sources={'runs/lifecycle/data/problems': 1.0}, seq_len=56)
  c.train = dict(init_from='runs/lifecycle/sft', steps=80, batch_size=64, log_every=2, eval_every=20,
                 checkpoint_every=20, compute_dtype='float32')
  c.optimizer = dict(lr=3e-4, schedule='linear', weight_decay=0.0)
  # Rounding of 1.3 M parameters and 4096 words: sampler and trainer are up to 2e-5 apart.
  c.rl = dict(prompts=128, group=1, max_new_tokens=20, rewards={'maths': 1.0}, tolerance=1e-4, kl_coef=0.005)
  c.policy = dict(name='ppo', value_coef=0.5)
  c.evaluate = dict(limit=128)
  return c
