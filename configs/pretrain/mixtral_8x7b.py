"""Mixtral 8x7B on 64 v5p chips, 4 sequences each.  `:expert` uses expert parallelism."""

from ml_collections import config_dict

VARIANTS = {'expert': dict(mesh=dict(data=1, fsdp=-1, expert=8, zero=0), train=dict(remat='full'))}


def get_config():
  c = config_dict.ConfigDict()
  c.model = dict(preset='mixtral_8x7b')
  c.data = dict(sources={'data/corpus': 1.0}, seq_len=4096)
  c.mesh = dict(data=4, fsdp=-1, zero=3)
  c.train = dict(steps=500000, batch_size=256, remat='out', log_every=10, eval_every=1000, checkpoint_every=1000)
  c.optimizer = dict(lr=3e-4, warmup_steps=2000, schedule='cosine', final_lr_fraction=0.1)
  return c
