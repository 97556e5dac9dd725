"""Reproduce the results of experiments/reliability/.  Takes about half an hour on 4 cores.

  llmjax prepare --config=configs/data/python_docs.py
  python tools/prove_reliability.py [--only=tests,checkpoints,chaos]

tests        the tests with damaged, malformed and restored inputs, including slow ones -> tests.json
checkpoints  tools/bench_checkpoint.py: the cost of saving and restoring -> checkpoints.json
chaos        `llmjax chaos` with one process and with two -> one_process.json, two_processes.json
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'experiments/reliability'
# Tests by guarantee.  The number of inputs of a test is its property `inputs`, or the number in the name of a fuzz
# test, or one.
TESTS = {
    'damaged checkpoints, none loaded': ['tests/checkpoint/test_manifest.py::test_every_damage_to_every_file_is_named'],
    'malformed inputs, a clear line each': ['tests/fuzz'],
    'wrong commands, word for word': ['tests/test_wrong_commands.py'],
    'restores on another mesh, to the bit': ['tests/parallel/test_meshes.py', '-k', 'a_checkpoint_of_one_mesh'],
}


def run_tests():
  """Run the tests; return {guarantee: {'inputs', 'tests', 'failed', 'seconds'}}."""
  results = {}
  for guarantee, names in TESTS.items():
    with tempfile.TemporaryDirectory() as folder:
      file = pathlib.Path(folder) / 'tests.xml'
      subprocess.run([sys.executable, '-m', 'pytest', '-q', '-m', '', '-o', 'junit_family=xunit1',
                      f'--junitxml={file}', *names], cwd=ROOT, check=False)
      cases = list(xml.etree.ElementTree.parse(file).iter('testcase'))
    failed = [c.get('name') for c in cases if c.find('failure') is not None or c.find('error') is not None]
    inputs = 0
    for case in cases:
      recorded = [p.get('value') for p in case.iter('property') if p.get('name') == 'inputs']
      number = re.search(r'\[(\d+)\]$', case.get('name')) if names == ['tests/fuzz'] else None
      inputs += int(recorded[0]) if recorded else int(number[1]) if number else 1
    results[guarantee] = {'inputs': inputs, 'tests': len(cases), 'failed': failed,
                          'seconds': round(sum(float(c.get('time')) for c in cases), 1)}
  return results


def run_chaos(name, *arguments):
  with tempfile.TemporaryDirectory() as folder:
    subprocess.run([sys.executable, '-m', 'llmjax', 'chaos', '--config=experiments/reliability/recipe.py',
                    f'--workdir={folder}/chaos', *arguments], cwd=ROOT, check=True)
    (FOLDER / name).write_bytes((pathlib.Path(folder) / 'chaos/chaos.json').read_bytes())


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='tests,checkpoints,chaos')
  only = parser.parse_args().only.split(',')
  os.environ['PYTHONPATH'] = str(ROOT)
  if 'tests' in only:
    results = run_tests()
    (FOLDER / 'tests.json').write_text(json.dumps(results, indent=1) + '\n')
    width = max(map(len, results))
    for guarantee, row in results.items():
      print(f'{guarantee:<{width}}  {row["inputs"]:>6,} in {row["tests"]} tests, {len(row["failed"])} failed, '
            f'{row["seconds"]:.0f} s')
    if any(row['failed'] for row in results.values()):
      raise SystemExit('some failed: see tests.json')
  if 'checkpoints' in only:
    subprocess.run([sys.executable, 'tools/bench_checkpoint.py', f'--output={FOLDER / "checkpoints.json"}'], cwd=ROOT,
                   check=True)
  if 'chaos' in only:
    run_chaos('one_process.json', '--kills=50')
    run_chaos('two_processes.json', '--steps=600', '--kills=20', '--processes=2')


if __name__ == '__main__':
  main()
