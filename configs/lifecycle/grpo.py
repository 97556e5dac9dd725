"""The fifth stage of tools/lifecycle.sh: GRPO, from the same model and on the same problems as PPO."""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.data = dict(sources={'runs/lifecycle/data/problems': 1.0}, seq_len=56)
  c.train = dict(init_from='runs/lifecycle/sft', steps=40, batch_size=128, log_every=1, eval_every=10,
                 checkpoint_every=10, compute_dtype='float32')
  c.optimizer = dict(lr=2e-4, schedule='linear', weight_decay=0.0)
  # Rounding of 1.3 M parameters and 4096 words: sampler and trainer are up to 2e-5 apart.
  c.rl = dict(prompts=16, group=8, max_new_tokens=20, rewards={'maths': 1.0}, tolerance=1e-4)
  c.policy = dict(name='grpo', kl_coef=0.04)
  c.evaluate = dict(limit=128)
  return c
