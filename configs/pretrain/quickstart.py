"""A small Llama on the Python documentation: minutes on a laptop's CPU."""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.model = dict(num_layers=4, d_model=192, num_heads=3, num_kv_heads=1, mlp_dim=512,
                 tie_embeddings=True)
  c.data = dict(sources={'data/python_docs': 1.0}, seq_len=256)
  c.train = dict(steps=300, batch_size=8, log_every=10, eval_every=100, checkpoint_every=100,
                 sample_every=100)
  c.optimizer = dict(name='adamw', lr=6e-3, warmup_steps=20, schedule='linear',
                     final_lr_fraction=0.02)
  c.evaluate = dict(limit=64)
  c.sample = dict(prompts=('def read_', 'Return the ', 'class Test'), max_new_tokens=96)
  return c
