"""The path of a chat template file.  No heavy imports."""

import os


def split_template(name):
  """Split FILE or FILE#NAME of `--config.template` into (file, name of a template in it or '')."""
  file, _, template = name.partition('#')
  return (name, '') if os.path.isfile(name) else (file, template)
