"""Conversations or instructions for fine-tuning: set --config.path=FILE_OR_DIR (JSONL, JSON, Parquet).

Records are `messages` with `tools`, ShareGPT's `conversations`, `prompt` and `completion`, or Alpaca's `instruction`,
`input`, `output`; docs/data_formats.md lists all formats and fields.  Use the tokenizer of the model to fine-tune:
--config.tokenizer.path=runs/quickstart/tokenizer.model.

Other kinds of records: --config.records=preference (`prompt`, `chosen`, `rejected`, or `prompt`, `completion`,
`label`), --config.records=prompts (`prompt`, `answer`), --config.records=stepwise (`prompt`, and `steps` of `text` and
`label`).
"""

from ml_collections import config_dict


def get_config():
  config = config_dict.ConfigDict()
  config.source = 'text_dir'
  config.records = 'chat'
  config.template = 'llmjax'
  return config
