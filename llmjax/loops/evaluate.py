"""`llmjax evaluate`: perplexity and bits per byte of held-out data, with gzip and xz; rewards of completions."""

import dataclasses
import json
import pathlib

import jax

from llmjax import config, secrets
from llmjax.checkpoint.load import load_params, read_config
from llmjax.data import prepared, stream
from llmjax.evaluate.compressors import compressor_baselines
from llmjax.evaluate.table import format_results
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
  """Evaluate a checkpoint, print a table, and write evaluation.json and the report."""
  del spec  # The config is the run's own config.json.
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
      for name, metrics in _evaluations(spec, mesh, params):
        results[f'{name}:{source}' if source else name] = {**metrics, 'step': step, 'seq_len': spec.data.seq_len}
  if not distributed.is_first():
    return 0
  file = workdir / 'evaluation.json'
  before = json.loads(file.read_text()) if file.exists() else {}
  file.write_text(json.dumps({**before, **results}, indent=2) + '\n')
  print(format_results(results))
  print(f'written to {file} and {write_report(workdir)}')
  return 0


def _specs(options, settings):
  """Return {source: spec to evaluate it with} of options.sources by name, or of '' for the run's own data.

  settings: the run's config.  How a source is read depends on its kind only, not on the run, so that different runs are
  evaluated on the same sequences.
  """
  overrides = {'splits': list(options.splits), 'limit': options.limit}
  if options.batch_size:
    overrides['batch_size'] = options.batch_size
  settings = {**settings, 'evaluate': {**settings.get('evaluate', {}), **overrides}}
  data = {**settings.get('data', {}), **({'seq_len': options.seq_len} if options.seq_len else {})}
  if not options.sources:
    return {'': spec_of_run(EvaluatedRunSpec, {**settings, 'data': data})}
  settings['evaluate'] |= {'extra_sources': [], 'per_source': False, 'tasks': []}
  if problems := list(template_problems(options.sources, options.workdir)):
    raise config.ConfigError([f"--{problem.removeprefix('data.')}" for problem in problems])
  specs = {}
  for folder in options.sources:
    kind = prepared.kind(prepared.read_manifest(folder))
    spec_class = CompletionsSpec if kind == 'prompts' else EvaluatedRunSpec
    specs[stream.folder_name(folder)] = spec_of_run(spec_class, {
        **settings, 'rl': {'rewards': {options.reward: 1.0}, 'max_new_tokens': options.max_new_tokens},
        'data': {**data, 'sources': {folder: 1.0}, 'packing': 'best_fit' if kind == 'chat' else 'concat',
                 'overflow': 'drop'}})
  return specs


def _check_tokenizer(workdir, spec):
  of_run, of_data = workdir / 'tokenizer.model', pathlib.Path(stream.load_tokenizer(spec.data).path)
  if of_run.exists() and of_run.read_bytes() != of_data.read_bytes():
    sources = ', '.join(spec.data.sources)
    raise config.ConfigError([f'{sources} has another tokenizer than this run; prepare it again with --force '
                              f'--config.tokenizer.path={of_run}'])


def _evaluations(spec, mesh, params):
  """Yield (evaluation name, metrics)."""
  if isinstance(spec, CompletionsSpec):
    if mesh.devices.flat[0].platform == 'cpu':  # As in `llmjax generate`.
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
    metrics = evaluate(params, {})
    # Compressors compress the whole split, so they are compared with models evaluated on the whole split only.
    whole = not spec.evaluate.limit or metrics['sequences'] < spec.evaluate.limit
    yield name, {**metrics, **(compressor_baselines(split, sources) if whole else {}),
                 'sources': secrets.hide_within(list(sources))}
