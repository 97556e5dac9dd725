"""A Llama of the size of GPT-2 small, on one host."""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.model = dict(num_layers=12, d_model=768, num_heads=12, mlp_dim=2048, tie_embeddings=True)
  c.data = dict(sources={'data/corpus': 1.0}, seq_len=1024)
  c.mesh = dict(data=-1)
  c.train = dict(steps=20000, batch_size=512, gradient_accumulation_steps=4, remat='none', log_every=10,
                 eval_every=1000, checkpoint_every=1000)
  c.optimizer = dict(lr=6e-4, warmup_steps=2000, schedule='cosine', final_lr_fraction=0.1)
  return c
