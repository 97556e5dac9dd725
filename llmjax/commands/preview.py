"""`llmjax preview`: show sequences as the model sees them, as text, with the trained tokens marked."""

import dataclasses
import os
import sys

import numpy as np

from llmjax.config import ConfigError
from llmjax.data import prepared, stream
from llmjax.data.dataset import Dataset
from llmjax.run.spec import prompt_data
from llmjax.text.chat import trained_spans

# On a terminal trained tokens are green; elsewhere they are in brackets.
TRAINED, PLAIN = '\x1b[32m', '\x1b[0m'
MARKS = ('[[', ']]')


def run(spec, options):
  """Print counts of each source and the first sequences of the stream."""
  data, output = spec.data, sys.stdout
  kinds = {folder: prepared.kind(prepared.read_manifest(folder)) for folder in data.sources}
  kind = next(iter(kinds.values()))
  if len(set(kinds.values()) - {'text', 'chat'}) and len(set(kinds.values())) > 1:
    raise ConfigError([f'data.sources: {", ".join(f"{f} holds {k}" for f, k in kinds.items())}; preview one at a time'])
  colour = output.isatty() and 'NO_COLOR' not in os.environ
  marks = (TRAINED, PLAIN) if colour else MARKS
  print(f'sequences of {data.seq_len} tokens, data.packing={data.packing}' if kind != 'prompts' else
        f'sequences of {data.seq_len} tokens, rl.max_new_tokens={spec.rl.max_new_tokens} of them for completions',
        file=output)
  _print_sources(data, kinds, options.split, output)
  if kind == 'prompts':
    _print_prompts(spec, options, output)
    return 0
  _print_sequences(spec, options, kind, marks, output)
  if not colour:
    print(f'{MARKS[0]}{"the token that ends a step" if kind == "stepwise" else "trained"}{MARKS[1]}, the rest is not '
          'trained', file=output)
  return 0


def _print_sequences(spec, options, kind, marks, output):
  data, tokenizer = spec.data, stream.load_tokenizer(spec.data)
  with stream.open_stream(data, batch_size=options.rows, seed=spec.train.seed, split=options.split) as batches:
    examples, batch = batches.describe(0), next(batches)
  per_example = len(batch['tokens']) // options.rows
  halves = ('undesirable', 'desirable') if data.unpaired() else ('rejected', 'chosen')
  for row in range(len(batch['tokens'])):
    example, weights = examples[row // per_example], batch['loss_mask'][row]
    name = f'{example["source"]} row {example["row"]}'
    if 'label' in batch:
      name += f', {halves[int(batch["label"][row])]}'
    used, trained = int((batch['segment_ids'][row] > 0).sum()), int((weights > 0).sum())
    note = f' trained, of total weight {weights.sum():g}' if weights.sum() != trained else ' trained'
    if kind == 'stepwise':
      note = f' steps, labels {", ".join(f"{label:g}" for label in batch["step_labels"][row][weights > 0])}'
    print(f'--- {name}: {used} of {data.seq_len} tokens, {trained}{note}', file=output)
    for number, (ids, weights) in enumerate(stream.documents_of(batch, row), 1):
      text = ''.join(marks[0] + _printable(t, output) + marks[1] if is_trained else _printable(t, output)
                     for t, is_trained in trained_spans(tokenizer, ids, weights))
      print(f'{number}: {text}', file=output)


def _printable(text, output):
  """Return text without control characters, which could move the cursor of a terminal."""
  return ''.join(c if c.isprintable() or c in '\n\t' else '\ufffd' for c in text) if output.isatty() else text


def _print_sources(data, kinds, split, output):
  lines = [f'{"source":<24}{"records":>11}{"documents":>12}{"rows":>9}{"tokens":>13}{"trained":>13}{"fill":>9}']
  notes = []
  for folder, kind in kinds.items():
    manifest = prepared.read_manifest(folder)
    notes += [f'{folder}: {note}' for note in prepared.notes(manifest)]
    counts = manifest['splits'].get(split)
    if counts is None:
      raise ConfigError([f'data.sources: {folder} has no {split} split'])
    trained = counts.get('trained', counts['tokens'] - counts['documents'])
    head = f'{folder:<24}{kind:>11}{counts["documents"]:>12,}'
    if kind == 'prompts':
      lines.append(f'{head}{"":>9}{counts["tokens"]:>13,}')
      continue
    dataset = Dataset(dataclasses.replace(data, sources={folder: 1.0}), split)
    sequences = len(dataset) * dataset.sequences_per_example
    fill = dataset.num_targets / max(sequences * data.seq_len, 1)
    lines.append(f'{head}{sequences:>9,}{counts["tokens"]:>13,}{trained:>13,}{fill:>9.2%}')
    if overflow := {k: n for k, n in dataset.overflow_counts().items() if n}:
      notes.append(f'{folder}: longer than {data.seq_len}: {" and ".join(f"{n:,} {k}" for k, n in overflow.items())}')
  print('\n'.join(lines + notes), file=output)


def _print_prompts(spec, options, output):
  tokenizer, data = stream.load_tokenizer(spec.data), prompt_data(spec)
  with stream.open_stream(data, batch_size=options.rows, seed=spec.train.seed, split=options.split) as prompts:
    for item in next(prompts):
      text = ''.join(t for t, _ in trained_spans(tokenizer, np.asarray(item['ids'])))
      print(f'--- {len(item["ids"])} tokens\n{_printable(text, output)}\nanswer: {_printable(item["answer"], output)}',
            file=output)
