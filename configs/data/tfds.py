"""A text dataset of TensorFlow Datasets: set --config.name, for example to lm1b, which is downloaded."""

from ml_collections import config_dict


def get_config():
  config = config_dict.ConfigDict()
  config.source = 'tfds'
  config.tokenizer = config_dict.ConfigDict()
  config.tokenizer.vocab_size = 16384
  config.tokenizer.sample_lines = 100_000
  return config
