"""The tables of `llmjax evaluate`."""


def format_results(results):
  """Format the results of `llmjax evaluate` as aligned tables: perplexities, rewards, and tasks of the user's own.

  results: {evaluation name: {metric: value}}.
  """
  tables = []
  for head, key, cells in (
      (('split', 'step', 'sequences', 'tokens', 'perplexity', 'bits/byte', 'gzip -9', 'xz -9'), 'loss', lambda r: (
          f'{r["sequences"]:,}', f'{r["tokens"]:,}', f'{r["perplexity"]:.2f}', f'{r["bits_per_byte"]:.3f}',
          *(f'{r[k]:.3f}' if k in r else '-' for k in ('gzip_bits_per_byte', 'xz_bits_per_byte')))),
      (('split', 'step', 'prompts', 'reward', 'ended', 'tokens each'), 'reward', lambda r: (
          f'{r["prompts"]:,}', f'{r["reward"]:.3f}', f'{r["ended"]:.1%}', f'{r["tokens"]:.1f}'))):
    rows = [(split, str(r['step']), *cells(r)) for split, r in results.items() if key in r]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    tables += ['  '.join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in (head, *rows) if rows]
  for name, result in results.items():
    if not {'loss', 'reward'} & set(result):
      numbers = ', '.join(f'{k} {v:.4g}' for k, v in result.items() if k not in ('step', 'seq_len'))
      tables.append(f'{name} at step {result["step"]}: {numbers}')
  return '\n'.join(tables)
