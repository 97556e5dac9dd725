"""Llama 2 70B on 64 v5p chips, 2 sequences each; `:v6e` for 256 v6e chips, `:pipeline` and `:tensor` for other meshes.

Weights are gathered over two mesh axes, data=4 and fsdp.  Over one axis that spans the whole torus, libtpu would use an
all-reduce of zero-padded arrays, which sends twice the bytes.
"""

from ml_collections import config_dict

VARIANTS = {
    'pipeline': dict(mesh=dict(stage=4), pipeline=dict(schedule='interleaved', rounds=20, microbatches=4)),
    'tensor': dict(mesh=dict(data=1, fsdp=-1, tensor=4, zero=0)),
    'v6e': dict(train=dict(batch_size=512, remat='full')),
}


def get_config():
  c = config_dict.ConfigDict()
  c.model = dict(preset='llama2_70b')
  c.data = dict(sources={'data/corpus': 1.0}, seq_len=4096)
  c.mesh = dict(data=4, fsdp=-1, zero=3)
  c.train = dict(steps=500000, batch_size=128, remat='mlp', log_every=10, eval_every=1000, checkpoint_every=1000)
  c.optimizer = dict(lr=1.5e-4, warmup_steps=2000, schedule='cosine', final_lr_fraction=0.1)
  return c
