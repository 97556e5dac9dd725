"""Llama 3 405B on 512 v5p chips; `:pod` for a whole pod of 6144, whose factor of three is in `data` and the batch."""

from ml_collections import config_dict

VARIANTS = {'pod': dict(mesh=dict(data=24), train=dict(batch_size=1536))}


def get_config():
  c = config_dict.ConfigDict()
  c.model = dict(preset='llama3_405b')
  c.data = dict(sources={'data/corpus': 1.0}, seq_len=8192)
  c.mesh = dict(data=1, fsdp=-1, tensor=4)
  c.train = dict(steps=1000000, batch_size=512, remat='full', log_every=10, eval_every=1000, checkpoint_every=1000)
  c.optimizer = dict(lr=8e-5, warmup_steps=2000, schedule='cosine', final_lr_fraction=0.1)
  return c
