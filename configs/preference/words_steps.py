"""A process reward model of the planted preference of configs/preference/words_base.py, from good and bad steps.

    llmjax prepare --config=configs/data/chat.py --config.path=data/words/steps.jsonl --config.records=stepwise \
      --config.template=plain --config.output=data/words_steps --config.tokenizer.path=data/words_chat/tokenizer.model
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.data = dict(sources={'data/words_steps': 1.0}, seq_len=64, packing='best_fit')
  c.train = dict(init_from='runs/words', steps=200, batch_size=32, log_every=40, eval_every=100)
  c.train.compute_dtype = 'float32'
  c.optimizer = dict(lr=2e-3, warmup_steps=20, weight_decay=0.0)
  return c
