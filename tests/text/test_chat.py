"""Conversations as tokens and weights: golden strings, weights of messages, ends that are learned, BOS once."""

import io
import json
import pathlib
import re
import runpy

import numpy as np
import pytest

from llmjax.text import tokenizer as tokenizers
from llmjax.text.chat import ChatFormat
from llmjax.text.templates import TEMPLATES, Renderer, Template, TemplateError
from tests.text.test_templates import generated_spans

CHAT = [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': 'y o'},
        {'role': 'user', 'content': 'and 2 + 2?'}, {'role': 'assistant', 'content': '4'}]
# What stands in [[ ]] is trained.
EXPECTED = {
    'llmjax': '<s><|user|>x<|end|><|assistant|>[[y o<|end|>]]<|user|>and 2 + 2?<|end|><|assistant|>[[4<|end|>]]',
    'chatml': '<s><|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n[[y o<|im_end|>]]\n<|im_start|>user\n'
              'and 2 + 2?<|im_end|>\n<|im_start|>assistant\n[[4<|im_end|>]]\n',
    'llama3': '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nx<|eot_id|>'
              '<|start_header_id|>assistant<|end_header_id|>\n\n[[y o<|eot_id|>]]'
              '<|start_header_id|>user<|end_header_id|>\n\nand 2 + 2?<|eot_id|>'
              '<|start_header_id|>assistant<|end_header_id|>\n\n[[4<|eot_id|>]]',
    'gemma': '<bos><start_of_turn>user\nx<end_of_turn>\n<start_of_turn>model\n[[y o<end_of_turn>]]\n'
             '<start_of_turn>user\nand 2 + 2?<end_of_turn>\n<start_of_turn>model\n[[4<end_of_turn>]]\n',
}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  """A tokenizer with the control symbols of every template."""
  special = [s for t in TEMPLATES.values() for s in t.special]
  lines = [f'word{i % 97} and text {i} y o x 4' for i in range(300)]
  path = tmp_path_factory.mktemp('chat') / 'tokenizer.model'
  path.write_bytes(tokenizers.train_tokenizer(lines, vocab_size=500, special=special))
  return tokenizers.Tokenizer(path)


def marked(tokenizer, template, messages):
  with ChatFormat(template, tokenizer) as chat:
    ids, weights = chat.encode(messages)
    assert ids.dtype == np.int32 and weights.dtype == np.float32 and len(ids) == len(weights)
    return chat.marked(ids, weights)


@pytest.mark.parametrize('name', EXPECTED)
def test_trained_text_is_golden(tokenizer, name):
  assert marked(tokenizer, name, CHAT) == EXPECTED[name]
  with ChatFormat(name, tokenizer) as chat:
    # A prompt is what a training sample has before its answer, to the token.
    ids, weights = chat.encode(CHAT[:2])
    before = chat.prompt(CHAT[:1])
    first = np.flatnonzero(weights)[0]
    np.testing.assert_array_equal(before, ids[:first])
    last = int(ids[np.flatnonzero(weights)[-1]])
    assert set(chat.stop_ids) == {tokenizer.eos_id, last}


def test_plain_completions_end_with_the_end_of_text(tokenizer):
  assert marked(tokenizer, 'plain', CHAT[:2]) == '<s>x[[y o</s>]]'
  with ChatFormat('plain', tokenizer) as chat:
    assert chat.stop_ids == (tokenizer.eos_id,)
    assert chat.marked(chat.prompt(CHAT[:1])) == '<s>x'
    with pytest.raises(TemplateError, match='one prompt and one completion'):
      chat.encode(CHAT)


def test_messages_have_weights(tokenizer):
  chat = [CHAT[0], {**CHAT[1], 'weight': 0}, CHAT[2], {**CHAT[3], 'weight': 0.25}]
  for name in EXPECTED:
    with ChatFormat(name, tokenizer) as form:
      ids, weights = form.encode(chat)
      plain = form.encode(CHAT)
    np.testing.assert_array_equal(ids, plain[0])  # Weights are no text.
    runs = np.split(weights[plain[1] > 0], np.flatnonzero(np.diff(np.flatnonzero(plain[1] > 0)) > 1) + 1)
    assert [set(run.tolist()) for run in runs] == [{0.0}, {0.25}], name
    assert not weights[plain[1] == 0].any()


@pytest.mark.parametrize(('source', 'expected'), [
    # The end stands outside of what is marked: models trained without it never stop.
    ("{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}<|end|>"
     "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}", '<s>x<|end|>[[y o<|end|>]]'),
    # There is no end at all.
    ("{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
     "{% else %}Q: {{ m.content }} A: {% endif %}{% endfor %}", '<s>Q: x A: [[y o</s>]]'),
    # The template brings the BOS, and the tokenizer's own: not twice.
    ("{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
     "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}", '<s>x[[y o</s>]]'),
])
def test_an_answer_always_ends_and_a_text_begins_once(tokenizer, tmp_path, source, expected):
  path = tmp_path / 'own.jinja'
  path.write_text(source)
  assert marked(tokenizer, str(path), CHAT[:2]) == expected


def test_pad_as_end_is_trained_all_the_same(tokenizer):
  # Weights go by place, never by id: a template that ends answers with <pad> trains it.
  template = Template("{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<pad>"
                      '{% endgeneration %}{% else %}{{ m.content }}<pad>{% endif %}{% endfor %}', ('<pad>',))
  with ChatFormat(template, tokenizer) as chat:
    ids, weights = chat.encode(CHAT[:2])
  assert ids[-1] == tokenizer.pad_id and weights[-1] == 1
  assert weights[ids == tokenizer.pad_id].tolist() == [0, 1]


def test_a_saved_format_is_the_same(tokenizer, tmp_path):
  for name in ('llama3', 'plain'):
    with ChatFormat(name, tokenizer) as chat:
      chat.save(tmp_path / 'chat.json')
      with ChatFormat.load(tmp_path / 'chat.json', tokenizer) as again:
        for a, b in zip(chat.encode(CHAT[:2]), again.encode(CHAT[:2]), strict=True):
          np.testing.assert_array_equal(a, b)


def test_wrong_templates_get_a_line(tokenizer, tmp_path):
  (tmp_path / 'no.json').write_text('{"bos_token": "<s>"}')
  for name, message in (('chatlm', 'write one of llmjax, '), (str(tmp_path / 'no.json'), 'no chat_template')):
    with pytest.raises(TemplateError, match=message):
      ChatFormat(name, tokenizer)
  bare = io.BytesIO(tokenizers.train_tokenizer(['some words to train'] * 99, vocab_size=300))
  (tmp_path / 'bare.model').write_bytes(bare.getvalue())
  with (ChatFormat('chatml', tokenizers.Tokenizer(tmp_path / 'bare.model')) as chat,
        pytest.raises(TemplateError, match=r'--config.tokenizer.special=<\|im_end\|>,<\|im_start\|>')):
    chat.encode(CHAT)


GOLDEN = pathlib.Path(__file__).with_name('golden')
CASES = runpy.run_path(str(GOLDEN / 'chats.py'))['CASES']


@pytest.mark.parametrize('name', TEMPLATES)
@pytest.mark.parametrize('case', CASES)
def test_tools_and_reasoning_are_rendered_as_by_transformers_or_refused(tokenizer, name, case):
  messages, tools = CASES[case]
  golden = json.loads((GOLDEN / 'chats.json').read_text())[name][case]
  with ChatFormat(name, tokenizer) as chat:
    if golden is None:
      field = 'tools' if tools and name != 'qwen' else 'reasoning_content'
      with pytest.raises(TemplateError, match=f'the chat template {name} does not render {field}'):
        chat.encode(messages, tools)
      return
    rendered = Renderer(name).render(messages, tools)
    assert [rendered.text, [list(span) for span in generated_spans(rendered)]] == golden
    ids, weights = chat.encode(messages, tools)
    begins = [begin for begin, _ in golden[1]]
    # The prompt of a turn is what comes before it in training.
    first = next(i for i, m in enumerate(messages) if m['role'] == 'assistant')
    np.testing.assert_array_equal(chat.prompt(messages[:first], tools), ids[:np.flatnonzero(weights)[0]])
    marked = chat.marked(ids, weights)
  assert marked.count('[[') == len(begins) == sum(m['role'] == 'assistant' for m in messages)
  assert 'degrees": 12' not in ''.join(re.findall(r'\[\[.*?\]\]', marked, re.S))


def test_reasoning_is_dropped_only_when_asked_and_counted(tokenizer):
  messages, _ = CASES['reasoning']
  for name in ('qwen', 'llama3', 'gemma', 'plain'):
    with ChatFormat(name, tokenizer, drop_reasoning=True) as chat:
      ids, _ = chat.encode(messages)
      assert chat.reasoning_dropped == 1 and 'remember' not in chat.marked(ids) and 'Rain.' in chat.marked(ids)
  with ChatFormat('plain', tokenizer) as chat, pytest.raises(TemplateError, match='plain does not render reasoning_c'):
    chat.encode(messages)


# Qwen3's way: reasoning of turns before the last question is left out, in its field and in the content.
LAST = ("{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% if loop.last and m.thinking %}"
        "<think>{{ m.thinking }}</think>{% endif %}{{ m.content.split('</think>')[-1] }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}")


def test_a_template_of_ones_own_loses_nothing_without_a_word(tokenizer):
  user, thought = {'role': 'user', 'content': 'Why?'}, {'reasoning_content': 'Hm, x.', 'content': 'So.'}
  inside = {'role': 'assistant', 'content': '<think>Hm, x.</think>So.'}
  said = {'role': 'assistant', **thought}
  with ChatFormat(Template(LAST, ()), tokenizer) as chat:
    assert '<think>Hm, x.</think>So.' in chat.marked(chat.encode([user, said])[0])
    for messages in ([user, said, user, said], [user, inside]):
      with pytest.raises(TemplateError, match='this run does not render reasoning_content'):
        chat.encode(messages)
    chat.prompt([user, inside, user])  # To ask is no training: the template decides what a model sees.
    for messages, tools, field in (
        ([user, said], CASES['call'][1], 'tools'),
        (CASES['call'][0], None, r'tool_calls \(message 2\)'),
        ([{'role': 'developer', 'content': 'x'}, user, said], None, r'the role developer \(message 1\)'),
        ([{**user, 'name': 'Ann'}, said], None, r'name \(message 1\)')):
      with pytest.raises(TemplateError, match=f'does not render {field}'):
        chat.encode(messages, tools)
  blind = "{% for m in messages if m.role != 'system' %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
  with ChatFormat(Template(blind, ()), tokenizer) as chat, pytest.raises(TemplateError, match=r'content \(message 1\)'):
    chat.encode([{'role': 'system', 'content': 'Be brief.'}, user, said])


def test_named_templates(tokenizer, tmp_path):
  make = lambda mark: ("{% for m in messages %}{% generation %}{{ '" + mark + "' + m.content }}{% endgeneration %}"
                       '{% endfor %}')
  file = tmp_path / 'tokenizer_config.json'
  both = [{'name': name, 'template': make(name)} for name in ('default', 'rag')]
  file.write_text(json.dumps({'chat_template': both}))
  assert 'defaultx' in marked(tokenizer, str(file), CHAT[:2]) and 'ragx' in marked(tokenizer, f'{file}#rag', CHAT[:2])
  with pytest.raises(TemplateError, match='the templates default, rag; choose one, as in .*json#default'):
    ChatFormat(f'{file}#tools', tokenizer)
  file.write_text(json.dumps({'chat_template': both[1:]}))
  with pytest.raises(TemplateError, match='rag; choose one, as in .*json#rag'):
    ChatFormat(str(file), tokenizer)
  file.write_text(json.dumps({'chat_template': make('one')}))
  with pytest.raises(TemplateError, match='leave #rag out'):
    ChatFormat(f'{file}#rag', tokenizer)


def test_masks_are_those_of_transformers():
  """The reference: apply_chat_template(return_assistant_tokens_mask=True) on a byte-level tokenizer."""
  transformers = pytest.importorskip('transformers')
  import tokenizers as hf

  special = ['<s>', '</s>', *dict.fromkeys(s for t in TEMPLATES.values() for s in t.special)]
  model = hf.Tokenizer(hf.models.BPE(vocab={b: i for i, b in enumerate(
      sorted(hf.pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
  model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = hf.decoders.ByteLevel()
  model.add_special_tokens(special)

  class Same:  # Our interface over the same ids.
    special_ids = {s: model.token_to_id(s) for s in special}
    bos_id, eos_id = special_ids['<s>'], special_ids['</s>']

    def encode(self, text):
      return np.array(model.encode(text).ids)

  for name, template in TEMPLATES.items():
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=template.bos or None, eos_token=template.eos or None)
    theirs = reference.apply_chat_template(CHAT, chat_template=template.source, return_dict=True,
                                           return_assistant_tokens_mask=True)
    with ChatFormat(name, Same()) as chat:
      ids, weights = chat.encode(CHAT)
    start = 0 if ids[0] == theirs['input_ids'][0] else 1  # Our BOS, where the template has none.
    assert start == (template.bos in ('', '<s>')), name
    assert ids[start:].tolist() == theirs['input_ids'], name
    assert weights[start:].tolist() == theirs['assistant_masks'], name
    assert 0 < weights.sum() < len(weights)
