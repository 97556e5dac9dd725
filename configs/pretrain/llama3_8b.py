"""Llama 3 8B on 256 v6e chips, 4 sequences each; `:long` trains on sequences of 131,072 tokens, one per 64 v5p chips.

`:long` shards the heads over `tensor` as well, because ring attention stores the scores of all heads of a device.
"""

from ml_collections import config_dict

VARIANTS = {
    'long': dict(data=dict(seq_len=131072), mesh=dict(data=1, fsdp=-1, context=8, tensor=8, zero=0),
                 train=dict(batch_size=1)),
}


def get_config():
  c = config_dict.ConfigDict()
  c.model = dict(preset='llama3_8b')
  c.data = dict(sources={'data/corpus': 1.0}, seq_len=8192)
  c.mesh = dict(data=4, fsdp=-1, zero=3)
  c.train = dict(steps=500000, batch_size=1024, remat='full', log_every=10, eval_every=1000, checkpoint_every=1000)
  c.optimizer = dict(lr=3e-4, warmup_steps=2000, schedule='cosine', final_lr_fraction=0.1)
  return c
