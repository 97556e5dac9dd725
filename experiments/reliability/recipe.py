"""A tiny model with everything that must survive a resume: dropout, packing, accumulation, a schedule, evaluations."""


def get_config():
  return {
      'model': {'num_layers': 2, 'd_model': 32, 'num_heads': 2, 'mlp_dim': 64, 'dropout': 0.1},
      'data': {'sources': {'data/python_docs': 1.0}, 'seq_len': 64, 'packing': 'concat'},
      'train': {'steps': 1200, 'batch_size': 8, 'gradient_accumulation_steps': 2, 'eval_every': 100,
                'checkpoint_every': 25},
      'optimizer': {'lr': 0.01, 'warmup_steps': 50},
      'evaluate': {'limit': 16},
  }
