"""Writes chats.json: what transformers' apply_chat_template makes of conversations with tools and reasoning.

    python -m venv V; V/bin/pip install transformers jinja2 numpy; PYTHONPATH=. V/bin/python tests/text/golden/chats.py

A template's entry is [text, [[begin, end], ...]], the characters that the assistant generates, or None where the
template refuses the conversation or leaves a part of it out.
"""

import json
import pathlib

CALL = {'type': 'function', 'function': {'name': 'get_weather', 'arguments': {'city': 'Zürich', 'days': 2}}}
TOOL = {'type': 'function', 'function': {
    'name': 'get_weather', 'description': 'Weather of a city.',
    'parameters': {'type': 'object', 'properties': {'city': {'type': 'string'}}, 'required': ['city']}}}
CALLS = {'role': 'assistant', 'content': '', 'tool_calls': [CALL]}
ASK = {'role': 'user', 'content': 'The weather in Zürich?'}
RESULT = {'role': 'tool', 'tool_call_id': 'c1', 'content': '{"degrees": 12}'}
SAID = {'role': 'assistant', 'content': 'It is 12 degrees.'}
SYSTEM = {'role': 'system', 'content': 'Be brief.'}
CASES = {  # name: (messages, tools)
    'plain': ([SYSTEM, ASK, SAID, {'role': 'user', 'content': 'Sure?'}, SAID], None),
    'call': ([ASK, CALLS, RESULT, SAID], [TOOL]),
    'call and system': ([SYSTEM, ASK, CALLS, RESULT, SAID], [TOOL]),
    'text and two calls': ([ASK, {'role': 'assistant', 'content': 'Let me look.', 'tool_calls': [CALL, CALL]},
                            RESULT, RESULT, SAID], [TOOL]),
    'reasoning': ([ASK, {'role': 'assistant', 'reasoning_content': 'I remember it.', 'content': 'Rain.'}], None),
    'reasoning and call': ([ASK, {'role': 'assistant', 'reasoning_content': 'I must look.', 'content': '',
                                  'tool_calls': [CALL]}, RESULT, SAID], [TOOL]),
}
RENDERED = {'llmjax': CASES, 'chatml': CASES, 'qwen': ('plain', 'call', 'call and system', 'text and two calls'),
            'llama3': ('plain',), 'gemma': ('plain',)}


def main():
  from transformers.utils.chat_template_utils import render_jinja_template

  from llmjax.text.templates import TEMPLATES

  golden = {}
  for name, template in TEMPLATES.items():
    golden[name] = {}
    for case, (messages, tools) in CASES.items():
      golden[name][case] = None
      if case in RENDERED[name]:
        (text,), (spans,) = render_jinja_template(
            [messages], tools=tools, chat_template=template.source, return_assistant_tokens_mask=True,
            bos_token=template.bos, eos_token=template.eos)
        golden[name][case] = [text, [list(span) for span in spans]]
  pathlib.Path(__file__).with_suffix('.json').write_text(
      json.dumps(golden, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
  main()
