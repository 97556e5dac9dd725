"""Runs several `llmjax plan` processes at a time, for `--search` and for the tools that fill tables.

A process takes about two cores and 4 GB while it compiles.  Programs compiled before come from the cache.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from llmjax.plan.text import duration, gib


@dataclasses.dataclass
class Job:
  """One `llmjax plan`.  arguments: its flags, except --output.  plan: the result; None on failure, see `error`."""

  name: str
  arguments: list
  plan: dict | None = None
  error: str = ''

  def outcome(self):
    """Return a summary of the result."""
    if self.plan is None:
      return f'failed: {self.error}'
    if not self.plan['fits']:
      return f'does not fit ({gib(self.plan["hbm_bytes"]["total"])} GiB)'
    return f'{self.plan["tokens_per_second_per_chip"]:,.0f} tokens/s/chip'


def run_jobs(jobs, concurrency, report=print):
  """Run all jobs, `concurrency` at a time, and fill in their plans.

  report: called with a line for each job that ends.  An exception, such as Ctrl-C, ends the running processes; plans
  of finished jobs are kept.
  """
  with tempfile.TemporaryDirectory() as folder:
    waiting, running, done, begin = list(jobs), [], 0, time.perf_counter()
    try:
      while waiting or running:
        while waiting and len(running) < concurrency:
          job, output = waiting.pop(0), pathlib.Path(tempfile.mkdtemp(dir=folder))
          running.append((job, _start(job, output), output))
        for job, process, output in [r for r in running if r[1].poll() is not None]:
          running.remove((job, process, output))
          _read(job, output)
          done += 1
          left = (time.perf_counter() - begin) / done * (len(waiting) + len(running))
          report(f'[{done}/{len(jobs)}] {job.name}: {job.outcome()}'
                 + (f'; about {duration(left)} left' if done < len(jobs) else ''))
        time.sleep(0.05)
    finally:
      for _, process, _ in running:
        process.terminate()
      for _, process, _ in running:
        process.wait()


def _start(job, output):
  with (output / 'errors').open('w') as errors:
    return subprocess.Popen([sys.executable, '-m', 'llmjax', 'plan', *job.arguments, f'--output={output}'],
                            env=os.environ, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)


def _read(job, output):
  if (output / 'plan.json').exists():
    job.plan = json.loads((output / 'plan.json').read_text())
  else:
    lines = (output / 'errors').read_text().strip().splitlines()
    job.error = lines[-1][:300] if lines else 'no message'
