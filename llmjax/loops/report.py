"""`llmjax report`: writes a run's report.html again from what is in its folder."""

import pathlib

from llmjax.config import ConfigError
from llmjax.evaluate.report import write_report


def run(spec, options):
  """Writes `<workdir>/report.html` and says where it is."""
  del spec  # The command takes no recipe.
  if not pathlib.Path(options.workdir).is_dir():
    raise ConfigError([f"--workdir={options.workdir}: there is no such folder; give a run's "
                       'folder, the --workdir of a pretrain'])
  print(f'report  {write_report(options.workdir)}')
