"""What `llmjax generate` can be asked for.  No JAX here."""

import dataclasses
import os

from llmjax.checkpoint import pickle_guard
from llmjax.config import setting

ANSWERS = 'answers.jsonl'  # In a run's folder: what it says to the prompts of a file.
CHAT_TEMPLATE = 'chat_template.json'  # In the folder of a run that was trained on conversations.


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
  """How the next token is chosen.  The defaults take the model's own distribution as it is."""

  temperature: float = setting(1.0, 'divides the logits; 0 always takes the most likely token',
                               minimum=0.0)
  top_k: int = setting(0, 'choose among this many most likely tokens; 0: all', minimum=0)
  top_p: float = setting(1.0, 'choose among the most likely tokens that hold this much '
                         'probability; 1: all', minimum=0.0, maximum=1.0)
  min_p: float = setting(0.0, 'leave out tokens less likely than this times the most likely one; '
                         '0: none', minimum=0.0, maximum=1.0)
  repetition_penalty: float = setting(
      1.0, 'above 1 makes tokens that were there before less likely')

  def validate(self):
    if self.repetition_penalty <= 0:
      yield (f'repetition_penalty={self.repetition_penalty} must be above 0; 1 is no penalty, '
             'and 1.1 to 1.3 are usual')
    if self.top_p == 0:
      yield 'top_p=0.0 leaves no token; write temperature=0 for the most likely one'


@dataclasses.dataclass(frozen=True)
class GenerateOptions(SamplingSpec):
  """Flags of `llmjax generate`."""

  temperature: float = setting(0.8, 'divides the logits; 0 always takes the most likely token',
                               minimum=0.0)
  top_p: float = setting(0.95, 'choose among the most likely tokens that hold this much '
                         'probability; 1: all', minimum=0.0, maximum=1.0)
  workdir: str = setting('', 'folder of the run whose model speaks', kind='path')
  step: int = setting(0, 'checkpoint to load; 0: the latest', minimum=0)
  prompt: str = setting('', 'text to go on from; without it: standard input, or a prompt line')
  prompt_file: str = setting('', 'file with the text to go on from, UTF-8', kind='path')
  prompts: str = setting('', 'JSONL of prompts (objects with prompt, question or messages) to answer all of, once '
                         "each: the answers go to answers.jsonl in the run's folder, for `llmjax report --compare`",
                       kind='path')
  max_new_tokens: int = setting(200, 'tokens to make at most', minimum=1)
  stop: tuple[str, ...] = setting(
      (), r"""text that ends the answer and is not printed, or a list of them: --stop=END, --stop='["END", "\n\n"]'""",
      kind='text')
  chat: bool = setting(False, "ask as in the run's conversations: the prompt is what the user says, and each line "
                       'typed goes on with the conversation')
  system: str = setting('', 'with --chat: the message that stands before all others')
  num_samples: int = setting(1, 'answers to each prompt', minimum=1)
  seed: int = setting(0, 'same seed, same answer', minimum=0)
  stream: bool = setting(True, 'print while it is made; --nostream prints it when done')
  json: bool = setting(False, 'print one JSON object for each answer, with tokens and logprobs')

  def validate(self):
    yield from super().validate()
    if not self.workdir:
      yield 'workdir is missing; write --workdir=runs/NAME, the folder of a pretrain run'
    elif refused := pickle_guard.refusal(self.workdir):
      yield f'workdir={refused}'
    yield from pickle_guard.no_run(self.workdir)
    if self.prompt and self.prompt_file:
      yield 'prompt and prompt_file are both set; write one of them'
    if self.prompts and (self.prompt or self.prompt_file or self.num_samples > 1):
      yield 'prompts gives one answer to each line of a file; leave out --prompt, --prompt-file and --num-samples'
    if self.prompts and not os.path.isfile(self.prompts):
      yield f'prompts={self.prompts}: there is no such file; give JSONL with objects such as {{"prompt": TEXT}}'
    if self.system and not self.chat:
      yield 'system needs --chat; add it, or leave --system out'
    within = [os.path.isfile(os.path.join(self.workdir, name)) for name in ('config.json', CHAT_TEMPLATE)]
    if self.chat and within == [True, False]:
      yield (f'chat: {self.workdir} was not trained on conversations (no {CHAT_TEMPLATE}); leave --chat out, or '
             'fine-tune it: llmjax finetune')
    if '' in self.stop:
      yield 'stop holds an empty text, which would end every answer at once; leave it out'

  @property
  def stop_texts(self):
    r"""The stop texts, with \n and \t standing for themselves as a shell would not write them."""
    return tuple(s.replace('\\n', '\n').replace('\\t', '\t') for s in self.stop)
