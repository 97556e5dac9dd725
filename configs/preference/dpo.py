"""Direct preference optimization (DPO) of a chat model on pairs of a chosen and a rejected completion.

Prepare the pairs as in configs/reward/preference.py. Other losses: --config.preference.loss=ipo, kto, orpo, simpo, ...
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.data = dict(sources={'data/pairs': 1.0}, overflow='drop')
  c.train = dict(init_from='runs/chat', steps=200, batch_size=16, log_every=10, eval_every=50, checkpoint_every=50)
  c.optimizer = dict(lr=1e-4, warmup_steps=20, schedule='linear', weight_decay=0.0)
  c.preference = dict(loss='sigmoid', beta=0.1)
  c.evaluate = dict(limit=512)
  return c
