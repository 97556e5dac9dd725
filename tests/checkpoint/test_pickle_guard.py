"""Pickled weights are refused unread, and no code of llmjax executes the contents of a file."""

import ast
import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from llmjax import config
from llmjax.checkpoint import pickle_guard
from llmjax.commands.spec import LayoutSpec
from llmjax.generate.spec import GenerateOptions

ROOT = pathlib.Path(__file__).parents[2]
# (file, name) of what would be forbidden elsewhere, with the reason.
ALLOWED = {
    ('llmjax/recipes.py', 'runpy.run_path'): 'a recipe is a Python file of the user: it is code, SECURITY.md says so',
    ('llmjax/config.py', 'ast.literal_eval'): 'literals only, of the command line; it calls nothing',
    ('llmjax/cluster/gke.py', 'yaml'): 'safe_dump only, which writes a manifest; no YAML is loaded',
    ('tools/bench_decode.py', 'np.load'): "weights that the tool's own other process has just written",
}
FORBIDDEN_MODULES = ('pickle', 'cPickle', 'cloudpickle', 'dill', 'joblib', 'marshal', 'shelve', 'yaml')
FORBIDDEN_CALLS = ('eval', 'exec', 'compile', '__import__', 'execfile', 'os.system', 'os.popen', 'torch.load',
                   'runpy.run_path', 'runpy.run_module', 'ast.literal_eval', 'pickle.load', 'yaml.load',
                   'subprocess.getoutput', 'subprocess.getstatusoutput')


class Evil:
  """Unpickling this creates a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), 'w')


def evil_files(folder, witness):
  """Write pickles under every name and disguise; returns their paths."""
  data = pickle.dumps(Evil(witness))
  paths = [folder / f'model{suffix}' for suffix in pickle_guard.PICKLED]
  for path in paths:
    path.write_bytes(data)
  for protocol in range(2, 6):
    paths.append(folder / f'protocol{protocol}')
    paths[-1].write_bytes(pickle.dumps(Evil(witness), protocol))
  paths.append(folder / 'weights.safetensors')  # A pickle under a good name.
  paths[-1].write_bytes(data)
  paths.append(folder / 'archive')  # What torch.save writes.
  with zipfile.ZipFile(paths[-1], 'w') as z:
    z.writestr('archive/data.pkl', data)
  paths.append(folder / 'UPPER.PT')
  paths[-1].write_bytes(data)
  return paths


def test_pickles_are_refused_unread(tmp_path):
  witness = tmp_path / 'witness'
  for path in evil_files(tmp_path, witness):
    line = pickle_guard.refusal(path)
    assert line and '\n' not in line and 'never loaded' in line and 'weights_only=True' in line, path
  assert not witness.exists()
  np.save(tmp_path / 'objects.npy', np.array([Evil(witness)], object), allow_pickle=True)
  assert 'may hold pickled objects' in pickle_guard.refusal(tmp_path / 'objects.npy')
  (tmp_path / 'hub').mkdir()
  (tmp_path / 'hub' / 'pytorch_model.bin').write_bytes(b'x')
  assert 'pytorch_model.bin' in pickle_guard.refusal(tmp_path / 'hub')
  (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
  assert pickle_guard.refusal(tmp_path / 'run') is None
  assert pickle_guard.refusal(tmp_path / 'absent') is None


def test_every_command_that_loads_weights_refuses_them(tmp_path):
  file = tmp_path / 'model.pt'
  file.write_bytes(pickle.dumps(Evil(tmp_path / 'witness')))
  with pytest.raises(config.ConfigError, match='train.init_from=.*model.pt holds a pickle'):
    config.build(LayoutSpec, {'model': {'vocab_size': 256}}, [('train.init_from', str(file))])
  with pytest.raises(config.ConfigError, match='workdir=.*model.pt holds a pickle'):
    config.build(GenerateOptions, {'workdir': str(file)})
  from llmjax.checkpoint import load as loading

  for load in (loading.read_config, lambda path: loading.restore_params(path, None)):
    with pytest.raises(config.ConfigError, match='holds a pickle'):
      load(file)
  assert not (tmp_path / 'witness').exists()


def test_the_conversion_command_is_python():
  code = pickle_guard.CONVERT.format('model.pt').split('"')[1]
  names = {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}
  assert {'load', 'save_file'} <= names


def dotted(node):
  parts = []
  while isinstance(node, ast.Attribute):
    parts.append(node.attr)
    node = node.value
  return '.'.join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ''


def forbidden_uses(source):
  """Return the forbidden names that a source uses, np.load and torch.load unless they are safe."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {a.name for a in node.names if a.name.split('.')[0] in FORBIDDEN_MODULES}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names = {f'{node.module}.{a.name}' for a in node.names}
      found |= {n for n in names if n.split('.')[0] in FORBIDDEN_MODULES or n in FORBIDDEN_CALLS}
    elif isinstance(node, ast.Call):
      name, words = dotted(node.func), {k.arg: k.value for k in node.keywords}
      is_false = lambda v: isinstance(v, ast.Constant) and v.value is False
      if name in FORBIDDEN_CALLS:
        found.add(name)
      elif name in ('np.load', 'numpy.load', 'jnp.load') and not is_false(words.get('allow_pickle')):
        found.add(name)
      elif any(k in words and not is_false(words[k]) for k in ('shell', 'allow_pickle', 'trust_remote_code')):
        found.add(f'{name} with shell, allow_pickle or trust_remote_code')
      elif name.endswith(('.extractall', '.extract')):
        found.add(name)
  return found


@pytest.mark.parametrize('source', [
    'import pickle', 'from pickle import loads', 'import yaml', 'eval(x)', 'torch.load(p)', 'np.load(p)',
    'np.load(p, allow_pickle=True)', 'subprocess.run(c, shell=True)', 'tar.extractall()', 'from os import system',
    'def f():\n  import dill', 'load(name, trust_remote_code=flag)'])
def test_the_scan_finds(source):
  assert forbidden_uses(source)


def test_no_code_executes_the_contents_of_a_file():
  found = {}
  files = [p for part in ('llmjax', 'tools', 'configs') for p in sorted((ROOT / part).rglob('*.py'))]
  assert len(files) > 80
  for path in files:
    for name in forbidden_uses(path.read_text()):
      found[path.relative_to(ROOT).as_posix(), name] = True
  assert set(found) == set(ALLOWED)
