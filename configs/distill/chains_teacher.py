"""The teacher of the distillation recipes: a near-optimal model of a Markov chain of words.  Under a minute on a CPU.

    python experiments/distill/make_chains.py data/chains
    llmjax prepare --config=configs/data/text_dir.py --config.path=data/chains/many.jsonl \
      --config.output=data/chains_many --config.tokenizer.vocab_size=320
    llmjax prepare --config=configs/data/text_dir.py --config.path=data/chains/few.jsonl \
      --config.output=data/chains_few --config.tokenizer.path=data/chains_many/tokenizer.model
    llmjax pretrain --config=configs/distill/chains_teacher.py --workdir=runs/chains_teacher
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.model = dict(num_layers=2, d_model=64, num_heads=4, mlp_dim=192, tie_embeddings=True)
  c.data = dict(sources={'data/chains_many': 1.0}, seq_len=32, packing='best_fit')
  c.train = dict(steps=800, batch_size=32, log_every=100, compute_dtype='float32')
  c.optimizer = dict(lr=4e-3, warmup_steps=40, weight_decay=0.0)
  return c
