"""`llmjax evaluate`: held-out perplexity and bits per byte of a run, beside gzip and xz; what its answers are worth."""

import dataclasses
import json
import pathlib

import jax

from llmjax import config, secrets
from llmjax.checkpoint.load import load_params, read_config
from llmjax.data import prepared, stream
from llmjax.evaluate.compressors import compressor_bits_per_byte
from llmjax.loops import rl
from llmjax.loops.pretrain import make_evaluators
from llmjax.model.model import Model
from llmjax.parallel import distributed, heartbeat, in_flight
from llmjax.parallel.mesh import fitting_mesh
from llmjax.parallel.sharding import tree_shardings
from llmjax.parallel.spec import DistributedSpec
from llmjax.report.report import write_report
from llmjax.run import start
from llmjax.run.saved_run import CompletionsSpec, EvaluatedRunSpec, spec_of_run
from llmjax.run.sources import template_problems
from llmjax.run.workdir import enable_compilation_cache


def run(spec, options):
  """Evaluates the checkpoint, prints a table, writes evaluation.json and the report."""
  del spec  # The run's own config.json is the config, but for where its processes were.
  with distributed.together(DistributedSpec()):
    return _evaluate(options)


def _evaluate(options):
  workdir = pathlib.Path(options.workdir)
  specs = _specs(options, read_config(workdir))
  for spec in specs.values():
    _check_tokenizer(workdir, spec)
  enable_compilation_cache(spec.train.compilation_cache)
  mesh, results = fitting_mesh(spec.mesh), {}
  watchdog = heartbeat.Heartbeat(jax.process_index(), jax.process_count(), stacks=workdir / 'stacks',
                                 progress=in_flight.finished)
  with jax.set_mesh(mesh), watchdog:
    watchdog.beat(options.step, 'evaluate')
    params, _, _, step = load_params(
        workdir, options.step,
        shardings=lambda model: tree_shardings(mesh, Model(model).param_names()))
    for source, spec in specs.items():
      for name, measured in _measure(spec, mesh, params):
        results[f'{name}:{source}' if source else name] = {**measured, 'step': step, 'seq_len': spec.data.seq_len}
  if not distributed.is_first():
    return 0
  file = workdir / 'evaluation.json'
  before = json.loads(file.read_text()) if file.exists() else {}
  file.write_text(json.dumps({**before, **results}, indent=2) + '\n')
  print(_table(results))
  print(f'written to {file} and {write_report(workdir)}')
  return 0


def _specs(options, settings):
  """Returns {source: the spec that it is evaluated with}: options.sources by name, or '' for the run's own data.

  settings: the run's config.  Sources are read as what they hold asks for, whatever the run was trained on, so that
  runs of all kinds are measured on the same rows.
  """
  asked = {'splits': list(options.splits), 'limit': options.limit}
  if options.batch_size:
    asked['batch_size'] = options.batch_size
  settings = {**settings, 'evaluate': {**settings.get('evaluate', {}), **asked}}
  data = {**settings.get('data', {}), **({'seq_len': options.seq_len} if options.seq_len else {})}
  if not options.sources:
    return {'': spec_of_run(EvaluatedRunSpec, {**settings, 'data': data})}
  settings['evaluate'] |= {'extra_sources': [], 'per_source': False, 'tasks': []}
  if problems := list(template_problems(options.sources, options.workdir)):
    raise config.ConfigError([f"--{problem.removeprefix('data.')}" for problem in problems])
  specs = {}
  for folder in options.sources:
    held = prepared.kind(prepared.read_manifest(folder))
    kind = CompletionsSpec if held == 'prompts' else EvaluatedRunSpec
    specs[stream.folder_name(folder)] = spec_of_run(kind, {
        **settings, 'rl': {'rewards': {options.reward: 1.0}, 'max_new_tokens': options.max_new_tokens},
        'data': {**data, 'sources': {folder: 1.0}, 'packing': 'best_fit' if held == 'chat' else 'concat',
                 'overflow': 'drop'}})
  return specs


def _check_tokenizer(workdir, spec):
  kept, now = workdir / 'tokenizer.model', stream.load_tokenizer(spec.data).path
  if kept.exists() and kept.read_bytes() != pathlib.Path(now).read_bytes():
    sources = ', '.join(spec.data.sources)
    raise config.ConfigError([f'{sources} was prepared again with another tokenizer than this run has; prepare it '
                              f'with --force --config.tokenizer.path={kept}'])


def _measure(spec, mesh, params):
  """Yields (name of an evaluation, its measures)."""
  if isinstance(spec, CompletionsSpec):
    if mesh.devices.flat[0].platform == 'cpu':  # As `generate` does.
      spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, compute_dtype='float32'))
    tokenizer = stream.load_tokenizer(spec.data)
    with stream.chat_format(spec.data) as chat:
      stop_ids = chat.stop_ids
    for split in spec.evaluate.splits:
      yield split, {**rl.evaluate(spec, mesh, tokenizer, stop_ids, None, split, params),
                    'sources': secrets.hide_within(list(spec.data.sources))}
    return
  for name, evaluate in start.make_tasks(spec, mesh).items():
    yield name, evaluate(params, {})
  evaluations = spec.evaluations()
  for name, evaluate in make_evaluators(spec, mesh).items():
    split, sources = evaluations[name]
    measured = evaluate(params, {})
    # A compressor gets the whole split, so it stands beside a model that was given the whole split alone.
    whole = not spec.evaluate.limit or measured['sequences'] < spec.evaluate.limit
    yield name, {**measured, **(_baselines(split, sources) if whole else {}),
                 'sources': secrets.hide_within(list(sources))}


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
  """Returns the results as aligned text; likelihoods and answers have columns of their own."""
  tables = []
  for head, key, cells in (
      (('split', 'step', 'sequences', 'tokens', 'perplexity', 'bits/byte', 'gzip -9', 'xz -9'), 'loss', lambda r: (
          f'{r["sequences"]:,}', f'{r["tokens"]:,}', f'{r["perplexity"]:.2f}', f'{r["bits_per_byte"]:.3f}',
          *(f'{r[k]:.3f}' if k in r else '-' for k in ('gzip_bits_per_byte', 'xz_bits_per_byte')))),
      (('split', 'step', 'answers', 'reward', 'ended', 'tokens each'), 'reward', lambda r: (
          f'{r["answers"]:,}', f'{r["reward"]:.3f}', f'{r["ended"]:.1%}', f'{r["tokens"]:.1f}'))):
    rows = [(split, str(r['step']), *cells(r)) for split, r in results.items() if key in r]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    tables += ['  '.join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in (head, *rows) if rows]
  for name, result in results.items():
    if not {'loss', 'reward'} & set(result):  # A task of the user's own.
      numbers = ', '.join(f'{k} {v:.4g}' for k, v in result.items() if k not in ('step', 'seq_len'))
      tables.append(f'{name} at step {result["step"]}: {numbers}')
  return '\n'.join(tables)
