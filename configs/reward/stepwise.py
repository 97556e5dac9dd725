"""A process reward model from solutions with a label for every step (arXiv:2305.20050).

Prepare the data: llmjax prepare --config=configs/data/chat.py --config.path=FILE.jsonl --config.records=stepwise \
  --config.output=data/steps --config.tokenizer.path=runs/chat/tokenizer.model
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.data = dict(sources={'data/steps': 1.0}, packing='best_fit', overflow='drop')
  c.train = dict(init_from='runs/chat', steps=300, batch_size=16, log_every=20, eval_every=100, checkpoint_every=100)
  c.optimizer = dict(lr=3e-4, warmup_steps=20, schedule='cosine', weight_decay=0.0)
  c.evaluate = dict(limit=512)
  return c
