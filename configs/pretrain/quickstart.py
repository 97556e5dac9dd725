"""A small Llama on the Python documentation.  Takes a few minutes on a laptop CPU."""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.model = dict(num_layers=4, d_model=128, num_heads=2, num_kv_heads=1, mlp_dim=384,
                 tie_embeddings=True)
  c.data = dict(sources={'data/python_docs': 1.0}, seq_len=256)
  c.train = dict(steps=1600, batch_size=4, log_every=20, eval_every=400, checkpoint_every=400,
                 sample_every=400)
  c.optimizer = dict(name='muon', lr=6e-3, warmup_steps=60, schedule='linear',
                     final_lr_fraction=0.02)
  c.evaluate = dict(limit=64)
  c.sample = dict(prompts=('def read_', 'Return the ', 'class Test'), max_new_tokens=96, temperature=0.7)
  return c
