"""The base model of the RL recipes: it generates the correct sum of two digits in 3 of 10 cases.  Seconds on a CPU.

    python experiments/rl/make_sums.py data/sums
    llmjax prepare --config=configs/data/chat.py --config.path=data/sums/chat.jsonl --config.output=data/sums_chat \
      --config.template=plain --config.tokenizer.vocab_size=300 --config.validation_fraction=0 --config.test_fraction=0
    llmjax prepare --config=configs/data/chat.py --config.path=data/sums/prompts.jsonl --config.records=prompts \
      --config.validation_fraction=0.2 --config.test_fraction=0 \
      --config.output=data/sums_prompts --config.template=plain --config.tokenizer.path=data/sums_chat/tokenizer.model
    llmjax pretrain --config=configs/rl/sums_base.py --workdir=runs/sums
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.model = dict(num_layers=2, d_model=64, num_heads=4, mlp_dim=128, tie_embeddings=True)
  c.data = dict(sources={'data/sums_chat': 1.0}, seq_len=16, packing='pad')
  c.train = dict(steps=600, batch_size=128, log_every=50, compute_dtype='float32')
  c.optimizer = dict(lr=4e-3, warmup_steps=20, weight_decay=0.0)
  c.evaluate = dict(splits=())
  return c
