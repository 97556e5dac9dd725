"""GRPO with the reward model of configs/preference/words_reward.py.

    llmjax prepare --config=configs/data/chat.py --config.path=data/words/prompts.jsonl --config.records=prompts \
      --config.template=plain --config.output=data/words_prompts --config.tokenizer.path=data/words_chat/tokenizer.model
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.data = dict(sources={'data/words_prompts': 1.0}, seq_len=64)
  c.train = dict(init_from='runs/words', steps=40, batch_size=128, log_every=5, eval_every=0, compute_dtype='float32')
  c.optimizer = dict(lr=1e-3, warmup_steps=0, schedule='constant', weight_decay=0.0)
  c.rl = dict(prompts_per_iteration=16, num_generations=8, max_new_tokens=40,
              rewards={'model': 1.0}, reward_model='runs/reward')
  c.policy = dict(name='grpo', kl_coef=0.04)
  c.evaluate = dict(limit=16)
  return c
