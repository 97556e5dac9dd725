"""`llmjax evaluate`: held-out perplexity and bits per byte of a run, beside gzip and xz."""

import dataclasses
import json
import pathlib

import jax

from llmjax import config
from llmjax.checkpoint.checkpoints import load_params, read_config
from llmjax.data import prepared, stream
from llmjax.evaluate.compressors import compressor_bits_per_byte
from llmjax.evaluate.report import write_report
from llmjax.loops.pretrain import make_evaluators
from llmjax.loops.spec import PretrainSpec, of_run
from llmjax.loops.workdir import enable_compilation_cache
from llmjax.model import decoder
from llmjax.parallel import distributed
from llmjax.parallel.mesh import fitting_mesh
from llmjax.parallel.sharding import tree_shardings
from llmjax.parallel.spec import DistributedSpec


def run(spec, options):
  """Evaluates the checkpoint, prints a table, writes evaluation.json and the report."""
  del spec  # The run's own config.json is the config, but for where its processes were.
  with distributed.together(DistributedSpec()):
    return _evaluate(options)


def _evaluate(options):
  workdir = pathlib.Path(options.workdir)
  spec = of_run(PretrainSpec, read_config(workdir))
  kept, now = workdir / 'tokenizer.model', stream.load_tokenizer(spec.data).path
  if kept.exists() and kept.read_bytes() != pathlib.Path(now).read_bytes():
    sources = ', '.join(spec.data.sources)
    raise config.ConfigError([f'{sources} was prepared again with another tokenizer than this run has; prepare it '
                              f'with --force --config.tokenizer.path={kept}'])
  spec = dataclasses.replace(spec, evaluate=dataclasses.replace(
      spec.evaluate, splits=tuple(options.splits), limit=options.limit,
      batch_size=options.batch_size or spec.evaluate.batch_size))
  enable_compilation_cache(spec.train.compilation_cache)
  mesh = fitting_mesh(spec.mesh)
  with jax.set_mesh(mesh):
    params, _, _, step = load_params(
        workdir, options.step,
        shardings=lambda model: tree_shardings(mesh, decoder.param_names(model)))
    evaluations = spec.evaluations()
    results = {name: {**evaluate(params), **_baselines(*evaluations[name]), 'step': step}
               for name, evaluate in make_evaluators(spec, mesh).items()}
  if not distributed.is_first():
    return 0
  file = workdir / 'evaluation.json'
  before = json.loads(file.read_text()) if file.exists() else {}
  file.write_text(json.dumps({**before, **results}, indent=2) + '\n')
  print(_table(results))
  print(f'written to {file} and {write_report(workdir)}')
  return 0


def _baselines(split, sources):
  """Returns the compressors' bits per byte over all sources' text of the split, documents joined.

  Of conversations only what the assistant says is judged, which no compressor can be asked for: they have none.
  """
  if any(prepared.kind(prepared.read_manifest(folder)) != 'text' for folder in sources):
    return {}
  text = '\n'.join(text for folder in sources
                   for _, text in stream.read_documents(folder, split))
  return compressor_bits_per_byte(text.encode())


def _table(results):
  """Returns the results as aligned text; every column is in bits per byte but where it says."""
  rows = [('split', 'step', 'tokens', 'bytes', 'perplexity', 'bits/byte', 'gzip -9', 'xz -9')]
  for split, r in results.items():
    rows.append((split, str(r['step']), f'{r["tokens"]:,}', f'{r["bytes"]:,}',
                 f'{r["perplexity"]:.2f}', f'{r["bits_per_byte"]:.3f}',
                 *(f'{r[k]:.3f}' if k in r else '-' for k in ('gzip_bits_per_byte', 'xz_bits_per_byte'))))
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return '\n'.join('  '.join(cell.rjust(w) for cell, w in zip(row, widths, strict=True))
                   for row in rows)
