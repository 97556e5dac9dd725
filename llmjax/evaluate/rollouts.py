"""What a page shows of a run's rollouts (`rollouts/<iteration>.jsonl`): answers, and what they were worth."""

import html
import json

ITERATIONS, ROWS, CHARACTERS = 16, 4, 1500  # So that long runs stay small.


# Means of an iteration's completions, and how they are written.
MEANS = (('reward', 'mean reward {:.3g}'), ('kl', 'KL {:.3g} nats'), ('tokens', '{:.1f} tokens each'),
         ('ended', '{:.0%} ended'))


def read(folder):
  """Returns [(iteration, metrics, rows)] of up to ITERATIONS files, evenly over the run; rows with the highest
  rewards and with the lowest.  What cannot be read is left out.
  """
  files = sorted(folder.glob('rollouts/[0-9]*.jsonl'))
  if len(files) > ITERATIONS:
    files = [files[round(i * (len(files) - 1) / (ITERATIONS - 1))] for i in range(ITERATIONS)]
  found = []
  for path in files:
    try:
      header, *rows = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
      rows = sorted(rows, key=lambda row: -row['reward'])
      rows = rows if len(rows) <= ROWS else rows[:ROWS // 2] + rows[-ROWS // 2:]
      found.append((int(header['iteration']), dict(header['metrics']),
                    [(str(row['prompt']), str(row['text']), str(row['answer']), float(row['reward'])) for row in rows]))
    except (OSError, ValueError, KeyError, TypeError):
      continue
  return found


def render(found):
  """Returns the HTML of what `read` returns, newest first; '' for nothing."""
  parts = []
  for i, (number, values, rows) in enumerate(reversed(found)):
    named = ', '.join(form.format(values[name]) for name, form in MEANS if isinstance(values.get(name), (int, float)))
    body = ''.join(
        f'<p class="small soft">reward {reward:.3g} · right answer: {html.escape(answer[:200])}</p>'
        f'<pre><mark>{html.escape(prompt[-CHARACTERS:])}</mark>{html.escape(text[:CHARACTERS])}</pre>'
        for prompt, text, answer, reward in rows)
    parts.append(f'<details{" open" if i == 0 else ""}><summary><b>iteration {number:,}</b>'
                 f'<code>{html.escape(named)}</code></summary>{body}</details>')
  return f'<div class="card">{"".join(parts)}</div>' if parts else ''
