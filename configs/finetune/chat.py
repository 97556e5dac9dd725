"""Fine-tuning on conversations, with a quarter of the sequences replayed from the base model's corpus.

Prepare your data with configs/data/chat.py. Set --config.data.sources to it, and --config.train.init_from to the run of
the base model.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.data = dict(sources={'data/chat': 0.75, 'data/python_docs': 0.25}, packing='best_fit', overflow='drop')
  c.train = dict(init_from='runs/quickstart', steps=600, batch_size=8, log_every=20, eval_every=200,
                 checkpoint_every=200, sample_every=200)
  c.optimizer = dict(lr=1e-3, warmup_steps=30, schedule='cosine', weight_decay=0.0)
  c.evaluate = dict(limit=128, per_source=True)
  c.sample = dict(prompts=('What is the capital of France?', 'Remove a file (rm)'),
                  max_new_tokens=64, temperature=0.3)
  return c
