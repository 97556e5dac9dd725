"""An outcome reward model from pairs of a chosen and a rejected completion.

Prepare the data: llmjax prepare --config=configs/data/chat.py --config.path=FILE.jsonl --config.records=preference \
  --config.output=data/pairs --config.tokenizer.path=runs/chat/tokenizer.model
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.data = dict(sources={'data/pairs': 1.0}, overflow='drop')
  c.train = dict(init_from='runs/chat', steps=300, batch_size=16, log_every=20, eval_every=100, checkpoint_every=100)
  c.optimizer = dict(lr=3e-4, warmup_steps=20, schedule='cosine', weight_decay=0.0)
  c.evaluate = dict(limit=512)
  return c
