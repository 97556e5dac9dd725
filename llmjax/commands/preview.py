"""`llmjax preview`: rows as a model will see them, as text, with what is trained told apart."""

import dataclasses
import os
import sys

import numpy as np

from llmjax.config import ConfigError
from llmjax.data import prepared, stream
from llmjax.data.steps import JUDGED
from llmjax.run.spec import prompt_data
from llmjax.text.chat import stretches

# On a terminal what is trained is green, and control tokens are as they are written.
TRAINED, PLAIN = '\x1b[32m', '\x1b[0m'
MARKS = ('[[', ']]')


def run(spec, options):
  """Prints counts of each source and the first rows of the stream."""
  data, output = spec.data, sys.stdout
  kinds = {folder: prepared.kind(prepared.read_manifest(folder)) for folder in data.sources}
  kind = next(iter(kinds.values()))
  if len(set(kinds.values()) - {'text', 'chat'}) and len(set(kinds.values())) > 1:
    raise ConfigError([f'data.sources: {", ".join(f"{f} holds {k}" for f, k in kinds.items())}; look at one at a time'])
  colour = output.isatty() and 'NO_COLOR' not in os.environ
  marks = (TRAINED, PLAIN) if colour else MARKS
  print(f'sequences of {data.seq_len} targets, data.packing={data.packing}' if kind != 'prompts' else
        f'sequences of {data.seq_len} targets, rl.max_new_tokens={spec.rl.max_new_tokens} of them for completions',
        file=output)
  _print_sources(data, kinds, options.split, output)
  if kind == 'prompts':
    _print_prompts(spec, options, output)
    return 0
  tokenizer = stream.load_tokenizer(data)
  open_rows = stream.open_pairs if kind == 'pairs' else stream.open_stream
  with open_rows(data, batch_size=options.rows, seed=spec.train.seed, split=options.split) as batches:
    places, batch = batches.describe(0), next(batches)
  each = len(batch['tokens']) // options.rows
  halves = ('good', 'bad') if data.unpaired() else ('chosen', 'rejected')
  for row in range(len(batch['tokens'])):
    place, weights = places[row // each], batch['loss_mask'][row]
    name = f'{place["source"]} row {place["row"]}' + (('', f', {halves[row % 2]}')[each - 1])
    used, trained = int((batch['segment_ids'][row] > 0).sum()), int((weights > 0).sum())
    extra = f' trained, of weight {weights.sum():g}' if weights.sum() != trained else ' trained'
    extra = f' steps ({", ".join(f"{w - JUDGED:g}" for w in weights[weights > 0])})' if kind == 'steps' else extra
    print(f'--- {name}: {used} of {data.seq_len} places, {trained}{extra}', file=output)
    for number, (ids, weights) in enumerate(stream.documents_of(batch, row), 1):
      text = ''.join(marks[0] + _safe(t, output) + marks[1] if on else _safe(t, output)
                     for t, on in stretches(tokenizer, ids, weights))
      print(f'{number}: {text}', file=output)
  if not colour:
    what = 'what ends a step' if kind == 'steps' else 'trained'
    print(f'{MARKS[0]}{what}{MARKS[1]}, and the rest is not', file=output)
  return 0


def _safe(text, output):
  """Returns text that moves no cursor."""
  return ''.join(c if c.isprintable() or c in '\n\t' else '\ufffd' for c in text) if output.isatty() else text


def _print_sources(data, kinds, split, output):
  lines = [f'{"source":<24}{"holds":>8}{"documents":>12}{"rows":>9}{"tokens":>13}{"trained":>13}{"fill":>9}']
  notes = []
  for folder, kind in kinds.items():
    alone = dataclasses.replace(data, sources={folder: 1.0})
    manifest = prepared.read_manifest(folder)
    notes += [f'{folder}: {note}' for note in prepared.notes(manifest)]
    found = manifest['splits'].get(split)
    if found is None:
      raise ConfigError([f'data.sources: {folder} has no {split} split'])
    trained = found.get('trained', found['tokens'] - found['documents'])
    head = f'{folder:<24}{kind:>8}{found["documents"]:>12,}'
    if kind == 'prompts':
      lines.append(f'{head}{"":>9}{found["tokens"]:>13,}')
      continue
    rows = stream.rows_of(alone, split)
    each = rows.each
    fill = rows.num_pairs / max(len(rows) * each * data.seq_len, 1)
    lines.append(f'{head}{len(rows) * each:>9,}{found["tokens"]:>13,}{trained:>13,}{fill:>9.2%}')
    left = {k: n for k, n in rows.left_out().items() if n}
    if left:
      notes.append(f'{folder}: longer than {data.seq_len}: {" and ".join(f"{n:,} {k}" for k, n in left.items())}')
  print('\n'.join(lines + notes), file=output)


def _print_prompts(spec, options, output):
  tokenizer, data = stream.load_tokenizer(spec.data), prompt_data(spec)
  with stream.open_prompts(data, batch_size=options.rows, seed=spec.train.seed, split=options.split) as prompts:
    for item in next(prompts):
      text = ''.join(t for t, _ in stretches(tokenizer, np.asarray(item['ids'])))
      print(f'--- {len(item["ids"])} tokens\n{_safe(text, output)}\nanswer: {_safe(item["answer"], output)}',
            file=output)
