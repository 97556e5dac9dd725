"""The third stage of tools/lifecycle.sh: a reward model from gold answers against corrupted and generated ones."""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.data = dict(sources={'runs/lifecycle/data/pairs': 1.0}, seq_len=64, overflow='drop')
  c.train = dict(init_from='runs/lifecycle/sft', steps=100, batch_size=16, log_every=10, eval_every=25,
                 checkpoint_every=50)
  c.optimizer = dict(lr=6e-4, warmup_steps=10, schedule='cosine', weight_decay=0.0)
  return c
