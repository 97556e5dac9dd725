"""Conversations to tokens and the loss weight of each, and what a model is to answer to.

    chat = ChatFormat('llmjax', tokenizer)
    ids, weights = chat.encode([{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}])
    ids = chat.prompt([{'role': 'user', 'content': 'Hi'}])       # until something of chat.stop_ids

Fine-tuning and generation both come here, so a model is asked in the very tokens it was trained on.
"""

import dataclasses
import functools
import json
import os
import pathlib

import numpy as np

from llmjax.text import unrendered
from llmjax.text.template_path import split_template
from llmjax.text.templates import TEMPLATES, Renderer, Template, TemplateError

# No template: a prompt and, right behind it, its completion, which the end-of-text token ends.
PLAIN = 'plain'


def load_template(name, tokenizer):
  """Returns the Template of a name or a file, or None for `plain`.  Raises TemplateError.

  A file is Jinja, or JSON with `chat_template` and perhaps `bos_token` and `eos_token`, as a Hugging Face
  tokenizer_config.json has them.  Of several named templates FILE is the one named `default`, FILE#NAME another.  Its
  special tokens are the tokenizer's control symbols that stand in it.
  """
  if name == PLAIN:
    return None
  if name in TEMPLATES:
    return TEMPLATES[name]
  file, chosen = split_template(name)
  try:
    text = pathlib.Path(file).read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as e:
    raise TemplateError(f'the chat template {name} cannot be read ({type(e).__name__}); write one of '
                        f'{", ".join((*TEMPLATES, PLAIN))}, or the path of a Jinja file') from e
  bos = eos = ''
  if file.endswith('.json'):
    try:
      values = json.loads(text)
      text = _choose(name, values['chat_template'], chosen)
      bos, eos = (_token_text(values.get(k)) for k in ('bos_token', 'eos_token'))
      if not isinstance(text, str):
        raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as e:
      if isinstance(e, TemplateError):
        raise
      raise TemplateError(f'{name} holds no chat_template; give a tokenizer_config.json, or a Jinja file') from e
  elif chosen:
    raise TemplateError(f'{file} is one template; leave #{chosen} out')
  special = tokenizer.special_ids
  by_id = {i: piece for piece, i in special.items()}
  return Template(text, tuple(s for s in special if s in text),
                  bos if bos in special else by_id[tokenizer.bos_id],
                  eos if eos in special else by_id[tokenizer.eos_id])


def _choose(name, found, chosen):
  """Returns the text of the template that is asked for: `found` is one, or [{'name', 'template'}, ...]."""
  if isinstance(found, list):
    found = {item['name']: item['template'] for item in found}
  elif isinstance(found, str) and not chosen:
    return found
  names = sorted(found) if isinstance(found, dict) else []
  if (chosen or 'default') in names:
    return found[chosen or 'default']
  if not names:
    raise TemplateError(f'{name}: the file has one template, without a name; leave #{chosen} out')
  raise TemplateError(f'{name}: the templates there are {", ".join(names)}; choose one, as in '
                      f'{split_template(name)[0]}#{names[0]}')


def _token_text(value):
  return value.get('content', '') if isinstance(value, dict) else value or ''


class ChatFormat:
  """A template and a tokenizer.  Use it in a `with` block: a template's program runs in a process of its own.

  template: a name, a file (see `load_template`), or a Template.  drop_reasoning: reasoning that the template does not
  render is left out and counted in `reasoning_dropped`, in place of a TemplateError.
  """

  def __init__(self, template, tokenizer, drop_reasoning=False):
    self.tokenizer = tokenizer
    self.template = load_template(template, tokenizer) if isinstance(template, str) else template
    self.name = template if isinstance(template, str) else next(
        (name for name, known in TEMPLATES.items() if known == template), 'of this run' if template else PLAIN)
    self.drop_reasoning, self.reasoning_dropped = drop_reasoning, 0
    self._renderer = Renderer(self.template) if self.template else None

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()

  def close(self):
    """Ends the template's process; the next use starts another."""
    if self._renderer:
      self._renderer.close()

  def encode(self, messages, tools=None):
    """Returns (ids int32 [n], weights float32 [n]): each token's weight as a target, 0 where it is not trained.

    messages: [{'role', 'content', 'weight'?, ...}], as `data.messages` has them; tools: OpenAI's list, or None.  What
    the assistant says, its reasoning and its calls are trained, 1 or the message's weight, and with it the control
    token that ends it; where a template has none there, the end-of-text token is added, so that a model learns to
    stop.  A BOS comes first, as before every document in pretraining, unless the template writes its own.  Raises
    TemplateError, also where the template leaves something out.
    """
    wanted = [_weight(m) for m in messages if m.get('role') == 'assistant']
    ids, runs = self._render(messages, tools) if self.template else self._join(messages, tools)
    if len(set(wanted)) > 1 and runs.max(initial=0) != len(wanted):
      raise TemplateError(f'the chat template marks {runs.max(initial=0)} answers of {len(wanted)}, so weights of '
                          'messages cannot be told apart')
    # Run r is what the r-th assistant message said; 0 is everything else.
    wanted = wanted if len(set(wanted)) > 1 else wanted[:1] * max(runs.max(initial=0), 1)
    table = np.array([0.0, *(wanted or [0.0])], np.float32)
    return ids, table[np.minimum(runs, len(table) - 1)]

  def prompt(self, messages, tools=None):
    """Returns int32 ids [n] after which the assistant speaks: the template's generation prompt ends them.

    The reasoning of earlier turns is what the template makes of it.
    """
    return (self._render(messages, tools, True) if self.template else self._join(messages, tools, True))[0]

  @functools.cached_property
  def stop_ids(self) -> tuple[int, ...]:
    """The tokens that end an answer: end of text, and what this template ends the assistant's turns with."""
    # Digits: a template that writes in capitals changes nothing here.
    ids, weights = self.encode([{'role': 'user', 'content': '1'}, {'role': 'assistant', 'content': '2'}])
    last = int(ids[np.flatnonzero(weights)[-1]]) if weights.any() else self.tokenizer.eos_id
    return tuple(dict.fromkeys((self.tokenizer.eos_id, last)))

  def _rendered(self, messages, tools, generate):
    """Returns the Rendered conversation; raises TemplateError where the template leaves a part of it out."""
    source = self.template.source
    names = [name for name in unrendered.REASONING_NAMES if unrendered.mentions(source, name)]
    plain = [_for_template(m, names) for m in messages]
    if unknown := unrendered.find_unknown(source, messages, tools):
      raise self._leaves_out(unknown)
    made = self._renderer.render(plain, tools, add_generation_prompt=generate)
    lost = unrendered.find_lost(made.text, messages, tools)
    if not lost:
      return made
    bare = [_without_reasoning(m) for m in messages]
    if unrendered.find_lost(made.text, bare, tools):
      raise self._leaves_out(lost)
    if not generate:
      self._drop_reasoning()
    return made

  def _leaves_out(self, field):
    if field.startswith('content'):
      return TemplateError(f'the chat template {self.name} changes or leaves out {field}')
    advice = ('write the role system' if 'developer' in field else
              'choose one that does, such as llmjax or chatml, or leave it out of the data')
    return TemplateError(f'the chat template {self.name} does not render {field}; {advice}')

  def _drop_reasoning(self):
    if not self.drop_reasoning:
      raise TemplateError(f'the chat template {self.name} does not render {unrendered.REASONING}; choose one that '
                          'does, such as llmjax or chatml, or write --config.reasoning=drop')
    self.reasoning_dropped += 1

  def _render(self, messages, tools=None, generate=False):
    """Returns (ids, runs): int32 [n], and which answer of the assistant's each is part of, from 1; 0: none."""
    parts = self._rendered(messages, tools, generate).tokens(self.tokenizer)
    special = {i: piece for piece, i in self.tokenizer.special_ids.items()}
    bos = (self.template.bos, special[self.tokenizer.bos_id])
    own_bos = bool(parts) and parts[0][0].control and parts[0][0].text in bos
    ids, runs = ([], []) if own_bos else ([[self.tokenizer.bos_id]], [0])
    run, speaking, ended = 0, False, True  # ended: a control token has ended the latest answer.
    for piece, part in parts:
      if piece.generated:
        run, ended = run + (not speaking), piece.control
      closes = speaking and not piece.generated and not ended and piece.control
      ended = ended or closes
      ids.append(part)
      runs += [run if piece.generated or closes else 0] * len(part)
      speaking = piece.generated
    if run and not ended and not generate and messages[-1]['role'] == 'assistant':
      ids.append([self.tokenizer.eos_id])
      runs.append(run)
    return np.concatenate(ids).astype(np.int32), np.array(runs, np.int32)

  def _join(self, messages, tools=None, generate=False):
    """The same without a template."""
    roles = [m.get('role') for m in messages]
    if tools or any(m.get('tool_calls') for m in messages):
      raise self._leaves_out('tools' if tools else 'tool_calls')
    if named := [m for m in messages if m.get('name')]:
      raise self._leaves_out(f'name {named[0]["name"][:40]!r}')
    if any(m.get(unrendered.REASONING) for m in messages) and not generate:
      self._drop_reasoning()
    if roles not in (['user', 'assistant'], ['user']):
      raise TemplateError(f'template={PLAIN} takes one prompt and one completion, not the turns {", ".join(roles)}; '
                          'choose a chat template')
    texts = [self.tokenizer.encode(m['content']) for m in messages]
    ids, runs = [[self.tokenizer.bos_id], texts[0]], [0] * (1 + len(texts[0]))
    if len(texts) == 2:
      ids += [texts[1], [self.tokenizer.eos_id]]
      runs += [1] * (len(texts[1]) + 1)
    return np.concatenate(ids).astype(np.int32), np.array(runs, np.int32)

  def marked(self, ids, weights=None):
    """Returns the text of ids with control tokens spelled out and, given weights, trained trained_spans in [[ ]]."""
    return ''.join(f'[[{text}]]' if trained else text for text, trained in self.trained_spans(ids, weights))

  def trained_spans(self, ids, weights=None):
    """Returns [(text, trained)]: the longest trained_spans of tokens that are all trained, or all not."""
    return trained_spans(self.tokenizer, ids, weights)

  def save(self, path):
    """Writes the template, for `load`: a run keeps it."""
    content = dataclasses.asdict(self.template) if self.template else None
    partial = pathlib.Path(f'{path}.partial')
    partial.write_text(json.dumps({'template': content}, indent=2) + '\n', encoding='utf-8')
    os.replace(partial, path)

  @classmethod
  def load(cls, path, tokenizer):
    """Returns the ChatFormat that `save` wrote; raises ValueError."""
    return cls(template_of(json.loads(pathlib.Path(path).read_text(encoding='utf-8'))['template']), tokenizer)


def template_of(values):
  """Returns the Template of what JSON kept of it, None for none."""
  return Template(**{**values, 'special': tuple(values['special'])}) if values else None


def same_template(one, other):
  """Returns whether two templates, as JSON kept them, are one; fields that only the newer of them has do not count."""
  if not one or not other:
    return not one and not other
  return all(one[name] == other[name] for name in one.keys() & other.keys())


def template_name(values):
  """Returns the name of a template, as JSON kept it, for messages; FILE for one that is none of ours."""
  if not values:
    return PLAIN
  return next((name for name, template in TEMPLATES.items()
               if same_template(json.loads(json.dumps(dataclasses.asdict(template))), values)), 'FILE')


def trained_spans(tokenizer, ids, weights=None):
  """Returns [(text, trained)] of ids, control tokens spelled out; weights: float [n], or None for none trained."""
  ids = np.asarray(ids)
  trained = np.zeros(len(ids), bool) if weights is None else np.asarray(weights) > 0
  names = {i: piece for piece, i in tokenizer.special_ids.items()}
  found, begin = [], 0
  for end in range(1, len(ids) + 1):
    if end < len(ids) and trained[end] == trained[begin]:
      continue
    text, plain = [], []
    for i in [*ids[begin:end].tolist(), None]:
      if i is None or i in names:  # Bytes make characters together, so plain tokens are decoded at once.
        text.append(tokenizer.decode(plain))
        plain = []
        text.append(names.get(i, ''))
      else:
        plain.append(i)
    found.append((''.join(text), bool(trained[begin])))
    begin = end
  return found


def _for_template(message, reasoning):
  """Returns a message as a template sees it: without its weight, its reasoning under the names that it reads."""
  if not isinstance(message, dict):
    return message
  plain = {k: v for k, v in message.items() if k not in ('weight', unrendered.REASONING)}
  return {**plain, **{name: message[unrendered.REASONING] for name in reasoning if unrendered.REASONING in message}}


def _without_reasoning(message):
  """Returns a message without its reasoning, also where it stands in the content, as <think> ... </think>."""
  plain = {k: v for k, v in message.items() if k != unrendered.REASONING}
  return {**plain, 'content': message['content'].split('</think>')[-1]}


def _weight(message):
  weight = message.get('weight', 1.0)
  return float(weight) if weight is not None else 1.0
