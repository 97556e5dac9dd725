"""GRPO of a chat model on prompts with verifiable answers.

Prepare the data: llmjax prepare --config=configs/data/chat.py --config.path=FILE.jsonl --config.records=prompts \
  --config.output=data/prompts --config.tokenizer.path=runs/chat/tokenizer.model
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.data = dict(sources={'data/prompts': 1.0}, overflow='drop')
  c.train = dict(init_from='runs/chat', steps=200, batch_size=128, log_every=10, eval_every=50, checkpoint_every=50)
  c.optimizer = dict(lr=1e-4, warmup_steps=10, schedule='linear', weight_decay=0.0)
  c.rl = dict(prompts_per_iteration=16, num_generations=8, max_new_tokens=64, rewards={'math': 1.0})
  c.policy = dict(name='grpo', kl_coef=0.04)
  c.evaluate = dict(limit=512)
  return c
