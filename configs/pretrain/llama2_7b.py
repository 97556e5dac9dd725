"""Llama 2 7B on 64 v5p chips, 4 sequences each; `:v5e` for 16 v5e chips.  More chips need a larger batch.

Weights are gathered over two mesh axes, data=4 and fsdp.  Over one axis that spans the whole torus, libtpu would use an
all-reduce of zero-padded arrays, which sends twice the bytes.
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
