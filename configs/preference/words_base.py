"""The base model of the planted preference: it generates each of 16 words equally often.  Under a minute on a CPU.

    python experiments/preference/make_words.py data/words
    llmjax prepare --config=configs/data/chat.py --config.path=data/words/chat.jsonl --config.output=data/words_chat \
      --config.template=plain --config.tokenizer.vocab_size=320
    llmjax prepare --config=configs/data/chat.py --config.path=data/words/pairs.jsonl --config.records=preference \
      --config.template=plain --config.output=data/words_pairs --config.tokenizer.path=data/words_chat/tokenizer.model
    llmjax pretrain --config=configs/preference/words_base.py --workdir=runs/words
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.model = dict(num_layers=2, d_model=64, num_heads=4, mlp_dim=128, tie_embeddings=True)
  c.data = dict(sources={'data/words_chat': 1.0}, seq_len=64, packing='best_fit')
  c.train = dict(steps=200, batch_size=32, log_every=50, compute_dtype='float32')
  c.optimizer = dict(lr=4e-3, warmup_steps=20, weight_decay=0.0)
  c.evaluate = dict(limit=64)
  return c
