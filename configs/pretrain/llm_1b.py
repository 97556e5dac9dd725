"""A Llama with 1.1 billion parameters, on a host with 8 chips; `:v5p` for a v5p host, which has 4."""

from ml_collections import config_dict

VARIANTS = {'v5p': dict(train=dict(gradient_accumulation_steps=2))}


def get_config():
  c = config_dict.ConfigDict()
  c.model = dict(num_layers=22, d_model=2048, num_heads=16, num_kv_heads=4, mlp_dim=5632)
  c.data = dict(sources={'data/corpus': 1.0}, seq_len=2048)
  c.mesh = dict(data=1, fsdp=-1)
  c.train = dict(steps=50000, batch_size=256, gradient_accumulation_steps=8, remat='minimal', log_every=10,
                 eval_every=1000, checkpoint_every=1000)
  c.optimizer = dict(lr=4e-4, warmup_steps=2000, schedule='cosine', final_lr_fraction=0.1)
  return c
