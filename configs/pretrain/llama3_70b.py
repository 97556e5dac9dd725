"""Llama 3 70B on 128 v5p chips, one sequence each."""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.model = dict(preset='llama3_70b')
  c.data = dict(sources={'data/corpus': 1.0}, seq_len=8192)
  c.mesh = dict(data=4, fsdp=-1, zero=3)
  c.train = dict(steps=500000, batch_size=128, remat='mlp', log_every=10, eval_every=1000, checkpoint_every=1000)
  c.optimizer = dict(lr=1.5e-4, warmup_steps=2000, schedule='cosine', final_lr_fraction=0.1)
  return c
