"""PPO, with a value head, on the sums of configs/rl/sums_grpo.py."""

import pathlib
import runpy

GRPO = runpy.run_path(str(pathlib.Path(__file__).with_name('sums_grpo.py')))['get_config']


def get_config():
  c = GRPO()
  c.train.update(steps=120, batch_size=128)
  c.rl.update(prompts=256, group=1, epochs=2, kl_coef=0.005)
  c.policy = dict(name='ppo', value_coef=0.5)
  return c
