"""Refuse weights that are pickles without reading them: unpickling runs arbitrary code. No JAX here.

`.pt`, `.pth`, `.bin` and `.ckpt` files are pickles, and `.npy` files of objects contain one. Only formats without code
are loaded, such as Orbax checkpoints.
"""

import json
import os
import pathlib

PICKLED = ('.pt', '.pth', '.bin', '.ckpt', '.pkl', '.pickle')
# `weights_only` unpickles nothing but tensors; clones, because safetensors stores no shared memory.
CONVERT = ("python -c \"import sys, torch, safetensors.torch as s; s.save_file({{k: v.clone() for k, v in "
           "torch.load(sys.argv[1], map_location='cpu', weights_only=True).items()}}, 'model.safetensors')\" {}")
EXAMPLE = "give a run's folder, or one of its checkpoints such as runs/quickstart/checkpoints/400"


def refusal(path):
  """Return one line on why the weights at a path are not loaded and what to do, or None.

  path: a file or folder, checked by its name and, for files, its first bytes.
  """
  path = pathlib.Path(path)
  if pickled := _find_pickle(path):
    return (f'{path} holds a pickle, which can run any program: it is never loaded. If you trust it, convert it to '
            f'safetensors where torch is installed: {CONVERT.format(pickled)}')
  if path.suffix in ('.npy', '.npz'):
    return f'{path} is a NumPy file, which may hold pickled objects: it is not loaded; {EXAMPLE}'
  if path.suffix == '.safetensors' and os.path.isfile(path):
    return f'{path}: importing safetensors is not supported yet; {EXAMPLE}'
  if os.path.isfile(path):
    return f'{path} is a file; {EXAMPLE}'
  return None


def no_run(workdir):
  """Yield the problem of a local folder that holds no run, or whose config.json is damaged."""
  if not workdir or os.path.isfile(workdir):
    return
  file = pathlib.Path(workdir, 'config.json')
  if not file.exists():
    yield (f"workdir={workdir} is not a run's folder (no config.json); give the --workdir that `llmjax pretrain` "
           'had')
    return
  try:
    if not isinstance(json.loads(file.read_bytes()), dict):
      yield f"workdir={workdir}: its config.json is not a run's config; give the --workdir that `llmjax pretrain` had"
  except OSError as e:
    yield f'workdir={workdir}: its config.json cannot be read: {e.strerror}'
  except (ValueError, RecursionError) as e:
    yield (f'workdir={workdir}: its config.json is damaged ({" ".join(str(e).split())[:200]}); every checkpoint has a '
           f'copy: llmjax checkpoint show --workdir={workdir}')


def _find_pickle(path):
  """Return the file at a path that is a pickle or named like one, or None."""
  if path.suffix.lower() in PICKLED:
    return path
  try:
    if os.path.isfile(path):
      return path if _looks_pickled(path) else None
    if os.path.isdir(path) and not (path / 'checkpoints').exists() and not (path / 'params').exists():
      return next((p for p in sorted(path.iterdir()) if p.suffix.lower() in PICKLED), None)
  except OSError:
    pass  # Whoever loads it reports why it cannot be read.
  return None


def _looks_pickled(path):
  """Return whether a file begins as a pickle of protocol 2 to 5, or as torch's zip archive of one."""
  with open(path, 'rb') as f:
    start = f.read(1024)
    size = os.fstat(f.fileno()).st_size
  return (size > 2 and start[:1] == b'\x80' and start[1] in (2, 3, 4, 5)) or (
      start[:4] == b'PK\x03\x04' and b'data.pkl' in start)
