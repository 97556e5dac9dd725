"""`llmjax report`: write the report on a run again, or a page that compares several runs."""

import pathlib

from llmjax.config import ConfigError
from llmjax.report.report import write_comparison, write_report


def run(spec, options):
  """Write `<workdir>/report.html`, or the page of --compare, and print its path."""
  del spec  # The command has no config.
  if not pathlib.Path(options.workdir).is_dir():
    raise ConfigError([f'--workdir={options.workdir}: there is no such folder; give the --workdir of a run'])
  if options.compare:
    output = options.output or pathlib.Path(options.workdir) / 'compare.html'
    try:
      print(f'report  {write_comparison((options.workdir, *options.compare), output)}')
    except OSError as e:
      raise ConfigError([f'--output={output} cannot be written: {e.strerror or e}']) from e
  else:
    print(f'report  {write_report(options.workdir)}')
