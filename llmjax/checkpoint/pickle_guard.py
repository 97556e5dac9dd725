"""Weights that are programs: pickles, whatever they are called, are refused unread.  No JAX here.

Unpickling runs what the file says, with the user's rights; `.pt`, `.pth`, `.bin` and `.ckpt` are pickles,
`.npy` files of objects hold one.  Only arrays without code are loaded, which Orbax checkpoints are.
"""

import json
import os
import pathlib

PICKLED = ('.pt', '.pth', '.bin', '.ckpt', '.pkl', '.pickle')
# `weights_only` unpickles nothing but tensors; clones, because safetensors stores no memory that is shared.
CONVERT = ("python -c \"import sys, torch, safetensors.torch as s; s.save_file({{k: v.clone() for k, v in "
           "torch.load(sys.argv[1], map_location='cpu', weights_only=True).items()}}, 'model.safetensors')\" {}")


def refusal(path):
  """Returns one line saying why weights at a path are not loaded and what to do, or None.

  path: a file or a folder; it is judged by its name, and a file by its first bytes too.
  """
  path = pathlib.Path(path)
  if found := _find_pickle(path):
    return (f'{path} holds a pickle, which can run any program: it is never loaded. Where torch is installed and '
            f'you trust it, turn it into safetensors: {CONVERT.format(found)}')
  if path.suffix in ('.npy', '.npz'):
    return (f"{path} is a NumPy file, which may hold pickled objects: it is not loaded; give a run's folder or one "
            'of its checkpoints')
  if path.suffix == '.safetensors' and os.path.isfile(path):
    return (f"{path}: this version imports no safetensors yet; give a run's folder, or one checkpoint of it such as "
            'runs/quickstart/checkpoints/400')
  if os.path.isfile(path):
    return f"{path} is a file; give a run's folder, or one checkpoint of it such as runs/quickstart/checkpoints/400"
  return None


def no_run(workdir):
  """Yields the line for a folder of this machine that holds no run, or one whose config.json is damaged."""
  if not workdir or os.path.isfile(workdir):
    return
  file = pathlib.Path(workdir, 'config.json')
  if not file.exists():
    yield (f"workdir={workdir} is not a run's folder (no config.json); give the --workdir that `llmjax pretrain` "
           'had')
    return
  try:
    if not isinstance(json.loads(file.read_bytes()), dict):
      yield f"workdir={workdir}: its config.json is no run's config; give the --workdir that `llmjax pretrain` had"
  except OSError as e:
    yield f'workdir={workdir}: its config.json cannot be read: {e.strerror}'
  except (ValueError, RecursionError) as e:
    yield (f'workdir={workdir}: its config.json is damaged ({" ".join(str(e).split())[:200]}); it is in every '
           f'checkpoint too: llmjax checkpoint show --workdir={workdir}')


def _find_pickle(path):
  """Returns the file of a path that is a pickle or named like one, or None."""
  if path.suffix.lower() in PICKLED:
    return path
  try:
    if os.path.isfile(path):
      return path if _looks_pickled(path) else None
    if os.path.isdir(path) and not (path / 'checkpoints').exists() and not (path / 'params').exists():
      return next((p for p in sorted(path.iterdir()) if p.suffix.lower() in PICKLED), None)
  except OSError:
    pass  # Whoever loads it says why it cannot be read.
  return None


def _looks_pickled(path):
  """Says whether a file begins as a pickle of protocol 2 to 5, or as torch's zip archive of one."""
  with open(path, 'rb') as f:
    start = f.read(1024)
    size = os.fstat(f.fileno()).st_size
  return (size > 2 and start[:1] == b'\x80' and start[1] in (2, 3, 4, 5)) or (
      start[:4] == b'PK\x03\x04' and b'data.pkl' in start)
