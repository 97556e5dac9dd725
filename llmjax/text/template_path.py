"""The path of a chat template's file.  Imports nothing heavy."""

import os


def split_template(name):
  """Returns (file, name of a template in it or '') of FILE or FILE#NAME, as `--config.template` has them."""
  file, _, chosen = name.partition('#')
  return (name, '') if os.path.isfile(name) else (file, chosen)
