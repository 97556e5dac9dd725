"""The second stage of tools/lifecycle.sh: supervised fine-tuning of the quickstart's model, with replay of its corpus.

Here and in the later stages, model and sequence length come from train.init_from.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.data = dict(packing='best_fit', overflow='drop', sources={
      'runs/lifecycle/data/questions': 0.55, 'runs/lifecycle/data/worked': 0.225, 'data/python_docs': 0.225})
  c.train = dict(init_from='runs/lifecycle/base', steps=300, batch_size=8, log_every=20, eval_every=100,
                 checkpoint_every=100)
  c.optimizer = dict(name='muon', lr=4e-3, warmup_steps=20, schedule='linear', final_lr_fraction=0.02)
  c.evaluate = dict(limit=64, per_source=True)
  return c
