"""Llama 2 7B, 4 rows on each of 64 v5p chips; `:v5e` for 16 of those.  More chips take a larger batch.

Weights are gathered in two steps, over 4 and over the other chips: over a whole torus libtpu would sum instead.
"""

from ml_collections import config_dict

VARIANTS = {
    'v5e': dict(data=dict(seq_len=2048), mesh=dict(data=1, fsdp=-1, zero=0),
                train=dict(batch_size=64, remat='full')),
}


def get_config():
  c = config_dict.ConfigDict()
  c.model = dict(preset='llama2_7b')
  c.data = dict(sources={'data/corpus': 1.0}, seq_len=4096)
  c.mesh = dict(data=4, fsdp=-1, zero=3)
  c.train = dict(steps=500000, batch_size=256, remat='out', log_every=10, eval_every=1000, checkpoint_every=1000)
  c.optimizer = dict(lr=3e-4, warmup_steps=2000, schedule='cosine', final_lr_fraction=0.1)
  return c
