"""A reward model of the planted preference of configs/preference/words_base.py."""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.data = dict(sources={'data/words_pairs': 1.0}, seq_len=64)
  c.train = dict(init_from='runs/words', steps=150, batch_size=32, log_every=30, eval_every=75, compute_dtype='float32')
  c.optimizer = dict(lr=1e-3, warmup_steps=10, weight_decay=0.0)
  return c
