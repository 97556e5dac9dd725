"""Conversations or instructions to fine-tune on: add --config.path=FILE_OR_DIR (JSONL, JSON, Parquet).

Records may be `messages`, ShareGPT's `conversations`, `prompt` and `completion`, or Alpaca's `instruction`, `input`,
`output`.  Give the tokenizer of the model that is to learn: --config.tokenizer.path=runs/quickstart/tokenizer.model.
--config.records=pairs reads `prompt`, `chosen`, `rejected`; --config.records=prompts reads `prompt`, `answer`;
--config.records=steps `prompt` and `steps` of `text` and `label`.
"""

from ml_collections import config_dict


def get_config():
  config = config_dict.ConfigDict()
  config.source = 'text_dir'
  config.records = 'chat'
  config.template = 'llmjax'
  return config
