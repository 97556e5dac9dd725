"""Encode conversations as tokens with loss weights, and prompts for generation, with a chat template.

    chat = ChatFormat('llmjax', tokenizer)
    ids, weights = chat.encode([{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}])
    ids = chat.prompt([{'role': 'user', 'content': 'Hi'}])       # to generate until one of chat.stop_ids

Fine-tuning and generation share this code, so prompts have exactly the tokens of training.
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

# No template: the prompt, directly followed by the completion and the end-of-text token.
PLAIN = 'plain'


def load_template(name, tokenizer):
  """Return the Template of a name or a file, or None for `plain`.  Raises TemplateError.

  A file is Jinja, or JSON with `chat_template` and optional `bos_token` and `eos_token`, such as a Hugging Face
  tokenizer_config.json.  FILE#NAME selects one of several named templates, FILE the one named `default`.  The special
  tokens of the template are the tokenizer's control symbols that occur in it.
  """
  if name == PLAIN:
    return None
  if name in TEMPLATES:
    return TEMPLATES[name]
  file, variant = split_template(name)
  try:
    text = pathlib.Path(file).read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as e:
    raise TemplateError(f'the chat template {name} cannot be read ({type(e).__name__}); write one of '
                        f'{", ".join((*TEMPLATES, PLAIN))}, or the path of a Jinja file') from e
  bos = eos = ''
  if file.endswith('.json'):
    try:
      values = json.loads(text)
      text = _choose(name, values['chat_template'], variant)
      bos, eos = (_token_text(values.get(k)) for k in ('bos_token', 'eos_token'))
      if not isinstance(text, str):
        raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as e:
      if isinstance(e, TemplateError):
        raise
      raise TemplateError(f'{name} has no chat_template; give a tokenizer_config.json, or a Jinja file') from e
  elif variant:
    raise TemplateError(f'{file} is one template; leave #{variant} out')
  special = tokenizer.special_ids
  by_id = {i: piece for piece, i in special.items()}
  return Template(text, tuple(s for s in special if s in text),
                  bos if bos in special else by_id[tokenizer.bos_id],
                  eos if eos in special else by_id[tokenizer.eos_id])


def _choose(name, templates, variant):
  """Return the requested template.  templates: the text of one, or [{'name', 'template'}, ...]."""
  if isinstance(templates, list):
    templates = {item['name']: item['template'] for item in templates}
  elif isinstance(templates, str) and not variant:
    return templates
  names = sorted(templates) if isinstance(templates, dict) else []
  if (variant or 'default') in names:
    return templates[variant or 'default']
  if not names:
    raise TemplateError(f'{name}: the file has one template, without a name; leave #{variant} out')
  raise TemplateError(f'{name}: the file has the templates {", ".join(names)}; choose one, as in '
                      f'{split_template(name)[0]}#{names[0]}')


def _token_text(value):
  return value.get('content', '') if isinstance(value, dict) else value or ''


class ChatFormat:
  """A chat template with a tokenizer.  Use it in a `with` block: templates are rendered in a worker process.

  template: a name, a file (see `load_template`), or a Template.  drop_reasoning: leave out reasoning that the template
  does not render, and count it in `reasoning_dropped`, instead of raising TemplateError.
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
    """End the worker process; the next use starts another."""
    if self._renderer:
      self._renderer.close()

  def encode(self, messages, tools=None):
    """Encode a conversation; return (ids int32 [n], weights float32 [n]), the loss weight of each token as a target.

    messages: [{'role', 'content', 'weight'?, ...}], as in `data.messages`.  tools: OpenAI's list, or None.  The text,
    reasoning and tool calls of the assistant are trained, with weight 1 or that of the message, and the control token
    that ends the turn; where the template has none, the end-of-text token is added, so that a model learns to stop.
    BOS is prepended, as to every document in pretraining, unless the template writes it.  Raises TemplateError, also
    where the template does not render a part of the conversation.
    """
    wanted = [_weight(m) for m in messages if m.get('role') == 'assistant']
    ids, runs = self._render(messages, tools) if self.template else self._join(messages, tools)
    if len(set(wanted)) > 1 and runs.max(initial=0) != len(wanted):
      raise TemplateError(f'the chat template marks {runs.max(initial=0)} assistant turns of {len(wanted)}, so that '
                          'the weights of messages cannot be assigned')
    # Run r is the text of the r-th assistant message; 0 is everything else.
    wanted = wanted if len(set(wanted)) > 1 else wanted[:1] * max(runs.max(initial=0), 1)
    table = np.array([0.0, *(wanted or [0.0])], np.float32)
    return ids, table[np.minimum(runs, len(table) - 1)]

  def prompt(self, messages, tools=None):
    """Encode a prompt that ends with the template's generation prompt; return int32 ids [n].

    Templates may leave out the reasoning of earlier turns.
    """
    return (self._render(messages, tools, True) if self.template else self._join(messages, tools, True))[0]

  @functools.cached_property
  def stop_ids(self) -> tuple[int, ...]:
    """The tokens that end a completion: end of text, and the token with which the template ends assistant turns."""
    # Digits, as a template may change letters.
    ids, weights = self.encode([{'role': 'user', 'content': '1'}, {'role': 'assistant', 'content': '2'}])
    last = int(ids[np.flatnonzero(weights)[-1]]) if weights.any() else self.tokenizer.eos_id
    return tuple(dict.fromkeys((self.tokenizer.eos_id, last)))

  def _rendered(self, messages, tools, generate):
    """Return the Rendered conversation; raise TemplateError where the template does not render a part of it."""
    source = self.template.source
    names = [name for name in unrendered.REASONING_NAMES if unrendered.mentions(source, name)]
    if unknown := unrendered.find_unknown(source, messages, tools):
      raise self._not_rendered(unknown)
    rendered = self._renderer.render([_for_template(m, names) for m in messages], tools, add_generation_prompt=generate)
    lost = unrendered.find_lost(rendered.text, messages, tools)
    if not lost:
      return rendered
    if unrendered.find_lost(rendered.text, [_without_reasoning(m) for m in messages], tools):
      raise self._not_rendered(lost)
    if not generate:
      self._drop_reasoning()
    return rendered

  def _not_rendered(self, field):
    if field.startswith('content'):
      return TemplateError(f'the chat template {self.name} changes or leaves out {field}; choose another template')
    advice = ('write the role system' if 'developer' in field else
              'choose one that does, such as llmjax or chatml, or leave it out of the data')
    return TemplateError(f'the chat template {self.name} does not render {field}; {advice}')

  def _drop_reasoning(self):
    if not self.drop_reasoning:
      raise TemplateError(f'the chat template {self.name} does not render {unrendered.REASONING}; choose one that '
                          'does, such as llmjax or chatml, or write --config.reasoning=drop')
    self.reasoning_dropped += 1

  def _render(self, messages, tools=None, generate=False):
    """Return (ids, runs), int32 [n] each: run is the number of the assistant turn of a token, from 1; 0: none."""
    parts = self._rendered(messages, tools, generate).tokens(self.tokenizer)
    special = {i: piece for piece, i in self.tokenizer.special_ids.items()}
    bos = (self.template.bos, special[self.tokenizer.bos_id])
    own_bos = bool(parts) and parts[0][0].control and parts[0][0].text in bos
    ids, runs = ([], []) if own_bos else ([[self.tokenizer.bos_id]], [0])
    run, generating, ended = 0, False, True  # ended: a control token has ended the latest assistant turn.
    for piece, part in parts:
      if piece.generated:
        run, ended = run + (not generating), piece.control
      closes = generating and not piece.generated and not ended and piece.control
      ended = ended or closes
      ids.append(part)
      runs += [run if piece.generated or closes else 0] * len(part)
      generating = piece.generated
    if run and not ended and not generate and messages[-1]['role'] == 'assistant':
      ids.append([self.tokenizer.eos_id])
      runs.append(run)
    return np.concatenate(ids).astype(np.int32), np.array(runs, np.int32)

  def _join(self, messages, tools=None, generate=False):
    """Return the same as `_render` without a template."""
    roles = [m.get('role') for m in messages]
    if tools or any(m.get('tool_calls') for m in messages):
      raise self._not_rendered('tools' if tools else 'tool_calls')
    if named := [m for m in messages if m.get('name')]:
      raise self._not_rendered(f'name {named[0]["name"][:40]!r}')
    if any(m.get(unrendered.REASONING) for m in messages) and not generate:
      self._drop_reasoning()
    if roles not in (['user', 'assistant'], ['user']):
      raise TemplateError(f'template={PLAIN} is for one prompt and one completion, not for turns {", ".join(roles)}; '
                          'choose a chat template')
    texts = [self.tokenizer.encode(m['content']) for m in messages]
    ids, runs = [[self.tokenizer.bos_id], texts[0]], [0] * (1 + len(texts[0]))
    if len(texts) == 2:
      ids += [texts[1], [self.tokenizer.eos_id]]
      runs += [1] * (len(texts[1]) + 1)
    return np.concatenate(ids).astype(np.int32), np.array(runs, np.int32)

  def marked(self, ids, weights=None):
    """Return the text of ids with control tokens spelled out and, given weights, trained spans in [[ ]]."""
    return ''.join(f'[[{text}]]' if is_trained else text
                   for text, is_trained in trained_spans(self.tokenizer, ids, weights))

  def save(self, path):
    """Write the template to a file, for `load`."""
    content = dataclasses.asdict(self.template) if self.template else None
    partial = pathlib.Path(f'{path}.partial')
    partial.write_text(json.dumps({'template': content}, indent=2) + '\n', encoding='utf-8')
    os.replace(partial, path)

  @classmethod
  def load(cls, path, tokenizer):
    """Return the ChatFormat that `save` wrote; raise ValueError where the file is damaged."""
    return cls(template_of(json.loads(pathlib.Path(path).read_text(encoding='utf-8'))['template']), tokenizer)


def template_of(values):
  """Return the Template of its fields as JSON, or None."""
  return Template(**{**values, 'special': tuple(values['special'])}) if values else None


def same_template(one, other):
  """Return whether two templates, as JSON, are equal in the fields that both have."""
  if not one or not other:
    return not one and not other
  return all(one[name] == other[name] for name in one.keys() & other.keys())


def template_name(values):
  """Return the name of a template, as JSON, for messages; FILE for one that is not built in."""
  if not values:
    return PLAIN
  return next((name for name, template in TEMPLATES.items()
               if same_template(json.loads(json.dumps(dataclasses.asdict(template))), values)), 'FILE')


def trained_spans(tokenizer, ids, weights=None):
  """Return [(text, is_trained)]: the longest spans of ids that are all trained or all not, control tokens spelled out.

  weights: float [n], or None where nothing is trained.
  """
  ids = np.asarray(ids)
  trained = np.zeros(len(ids), bool) if weights is None else np.asarray(weights) > 0
  names = {i: piece for piece, i in tokenizer.special_ids.items()}
  spans, begin = [], 0
  for end in range(1, len(ids) + 1):
    if end < len(ids) and trained[end] == trained[begin]:
      continue
    text, plain = [], []
    for i in [*ids[begin:end].tolist(), None]:
      if i is None or i in names:  # Plain tokens are decoded together, as several may form one character.
        text.append(tokenizer.decode(plain))
        plain = []
        text.append(names.get(i, ''))
      else:
        plain.append(i)
    spans.append((''.join(text), bool(trained[begin])))
    begin = end
  return spans


def _for_template(message, reasoning):
  """Return a message without its weight, and with its reasoning under the names that the template reads."""
  if not isinstance(message, dict):
    return message
  plain = {k: v for k, v in message.items() if k not in ('weight', unrendered.REASONING)}
  return {**plain, **{name: message[unrendered.REASONING] for name in reasoning if unrendered.REASONING in message}}


def _without_reasoning(message):
  """Return a message without its reasoning, also without <think> ... </think> in the content."""
  plain = {k: v for k, v in message.items() if k != unrendered.REASONING}
  return {**plain, 'content': message['content'].split('</think>')[-1]}


def _weight(message):
  weight = message.get('weight', 1.0)
  return float(weight) if weight is not None else 1.0
