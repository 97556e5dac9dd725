"""Conversations or instructions to fine-tune on: add --config.path=FILE_OR_DIR (JSONL, JSON, Parquet).

Records may be `messages` with `tools`, ShareGPT's `conversations`, `prompt` and `completion`, or Alpaca's
`instruction`, `input`, `output`; docs/data_formats.md has all forms and fields.  Give the tokenizer of the model that
is to learn: --config.tokenizer.path=runs/quickstart/tokenizer.model.  --config.records=preference reads `prompt`, `chosen`,
`rejected`, or `prompt`, `completion`, `label`; --config.records=prompts reads `prompt`, `answer`;
--config.records=stepwise `prompt` and `steps` of `text` and `label`.
"""

from ml_collections import config_dict


def get_config():
  config = config_dict.ConfigDict()
  config.source = 'text_dir'
  config.records = 'chat'
  config.template = 'llmjax'
  return config
