"""Your own text: set --config.path=DIR (text, Markdown, JSONL, Parquet; also compressed or in archives)."""

from ml_collections import config_dict


def get_config():
  config = config_dict.ConfigDict()
  config.source = 'text_dir'
  config.tokenizer = config_dict.ConfigDict()
  config.tokenizer.vocab_size = 4096
  return config
