"""A small Llama on the Python documentation: minutes on a laptop's CPU."""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.model = dict(num_layers=4, d_model=256, num_heads=4, num_kv_heads=2, mlp_dim=704)
  c.data = dict(sources={'data/python_docs': 1.0}, seq_len=256)
  c.train = dict(steps=400, batch_size=16, log_every=20, eval_every=200, checkpoint_every=200,
                 sample_every=200)
  c.optimizer = dict(name='adamw', lr=3e-3, warmup_steps=40, schedule='cosine')
  c.evaluate = dict(limit=160)
  c.sample = dict(prompts=('def ', 'Return ', 'class '), max_new_tokens=96)
  return c
