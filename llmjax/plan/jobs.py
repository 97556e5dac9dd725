"""Plans in processes of their own, several at a time: for `--search`, and for the tools that fill tables.

A process takes about two cores and 4 GB while it compiles; what was compiled before comes from the cache.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from llmjax.plan.words import duration, gib


@dataclasses.dataclass
class Job:
  """One `llmjax plan`.  arguments: its flags, but --output.  plan: its plan.json once it is there, None if it failed.

  error: why there is none.  seconds: what it took.
  """

  name: str
  arguments: list
  plan: dict | None = None
  error: str = ''
  seconds: float = 0.0

  def outcome(self):
    """Returns in words what came out."""
    if self.plan is None:
      return f'failed: {self.error}'
    if not self.plan['fits']:
      return f'does not fit ({gib(self.plan["hbm_bytes"]["total"])} GiB)'
    return f'{self.plan["tokens_per_second_per_chip"]:,.0f} tokens/s/chip'


def run_jobs(jobs, at_once, say=print, folder=None):
  """Runs all jobs, `at_once` at a time, with a line for each that ends and the time left; fills in their plans.

  folder: where each job's plan.json and plan.html stay, in a folder of its name; None: nowhere.  Ctrl-C and any
  other exception end the processes; plans that are there stay.
  """
  with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(folder or temporary)
    waiting, running, done, begin = list(jobs), [], 0, time.perf_counter()
    try:
      while waiting or running:
        while waiting and len(running) < at_once:
          job = waiting.pop(0)
          running.append((job, start(job, root / job.name), time.perf_counter()))
        for entry in [e for e in running if e[1].poll() is not None]:
          running.remove(entry)
          job, _, began = entry
          job.seconds = time.perf_counter() - began
          _read(job, root / job.name)
          done += 1
          left = (time.perf_counter() - begin) / done * (len(waiting) + len(running))
          say(f'[{done}/{len(jobs)}] {job.name}: {job.outcome()}'
              + (f'; about {duration(left)} left' if done < len(jobs) else ''))
        time.sleep(0.05)
    finally:
      for _, process, _ in running:
        process.terminate()
      for _, process, _ in running:
        process.wait()


def start(job, output):
  """Returns the process of one plan, which writes to the folder `output`."""
  output.mkdir(parents=True, exist_ok=True)
  (output / 'plan.json').unlink(missing_ok=True)  # Of an earlier time.
  with (output / 'errors').open('w') as errors:
    return subprocess.Popen([sys.executable, '-m', 'llmjax', 'plan', *job.arguments, f'--output={output}'],
                            env=os.environ, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)


def _read(job, output):
  if (output / 'plan.json').exists():
    job.plan = json.loads((output / 'plan.json').read_text())
  else:
    lines = (output / 'errors').read_text().strip().splitlines()
    job.error = lines[-1][:300] if lines else 'no message'
