"""The `sample` group of a config, and the flags of `llmjax generate`.  Does not import JAX."""

import dataclasses
import os

from llmjax.checkpoint import pickle_guard
from llmjax.config import setting

ANSWERS = 'answers.jsonl'  # In a run's folder: completions of the prompts of a file.
CHAT_TEMPLATE = 'chat_template.json'  # In the folder of a run that was trained on conversations.


@dataclasses.dataclass(frozen=True)
class SampleSpec:
  """The `sample` group: samples during training, written to samples.jsonl and the report."""

  prompts: tuple[str, ...] = setting((), 'prompts to complete every train.sample_every steps: one text, or a list such '
                                     'as ["Once upon a time, there was", "The end"]; empty: no samples', kind='text')
  max_new_tokens: int = setting(128, 'maximum number of tokens to generate', minimum=1)
  temperature: float = setting(0.8, 'sampling temperature; 0: greedy decoding', minimum=0.0)
  top_p: float = setting(0.95, 'nucleus sampling: sample from the smallest set of tokens with this total probability',
                         minimum=0.0, maximum=1.0)


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
  """How the next token is sampled.  The defaults leave the model's distribution as it is."""

  temperature: float = setting(1.0, 'sampling temperature; 0: greedy decoding', minimum=0.0)
  top_k: int = setting(0, 'sample from the k most likely tokens; 0: from all', minimum=0)
  top_p: float = setting(1.0, 'nucleus sampling: sample from the smallest set of tokens with this total probability; '
                         '1: from all', minimum=0.0, maximum=1.0)
  min_p: float = setting(0.0, 'minimum probability of a token, relative to the most likely one; 0: none', minimum=0.0,
                         maximum=1.0)
  repetition_penalty: float = setting(1.0, 'penalty on tokens that occur earlier in the sequence; 1: none')

  def validate(self):
    if self.repetition_penalty <= 0:
      yield (f'repetition_penalty={self.repetition_penalty} must be above 0; 1 is no penalty, '
             'and 1.1 to 1.3 are usual')
    if self.top_p == 0:
      yield 'top_p=0.0 leaves no token; write temperature=0 for greedy decoding'


@dataclasses.dataclass(frozen=True)
class GenerateOptions(SamplingSpec):
  """Flags of `llmjax generate`."""

  temperature: float = setting(0.8, 'sampling temperature; 0: greedy decoding', minimum=0.0)
  top_p: float = setting(0.95, 'nucleus sampling: sample from the smallest set of tokens with this total probability; '
                         '1: from all', minimum=0.0, maximum=1.0)
  workdir: str = setting('', 'folder of the run to load', kind='path')
  step: int = setting(0, 'step of the checkpoint to load; 0: the latest', minimum=0)
  prompt: str = setting('', 'prompt text; default: read standard input, or prompt interactively on a terminal')
  prompt_file: str = setting('', 'UTF-8 text file with the prompt', kind='path')
  prompts: str = setting('', 'JSONL file of prompts (objects with prompt, question or messages); one completion of '
                         "each is written to answers.jsonl in the run's folder, for `llmjax report --compare`",
                       kind='path')
  max_new_tokens: int = setting(200, 'maximum number of tokens to generate', minimum=1)
  stop: tuple[str, ...] = setting(
      (), r"""stop text, or a list of them; it is not printed: --stop=END, --stop='["END", "\n\n"]'""", kind='text')
  chat: bool = setting(False, "apply the run's chat template: the prompt is a user message, and lines typed on a "
                       'terminal continue the conversation')
  system: str = setting('', 'with --chat: the system message')
  num_samples: int = setting(1, 'completions per prompt', minimum=1)
  seed: int = setting(0, 'random seed of sampling', minimum=0)
  stream: bool = setting(True, 'print tokens as they are generated; --nostream prints the finished completion')
  json: bool = setting(False, 'print each completion as a JSON object with token ids and log-probabilities')

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
      yield 'prompts writes one completion of each line of a file; leave out --prompt, --prompt-file and --num-samples'
    if self.prompts and not os.path.isfile(self.prompts):
      yield f'prompts={self.prompts}: there is no such file; give JSONL with objects such as {{"prompt": TEXT}}'
    if self.system and not self.chat:
      yield 'system needs --chat; add it, or leave --system out'
    within = [os.path.isfile(os.path.join(self.workdir, name)) for name in ('config.json', CHAT_TEMPLATE)]
    if self.chat and within == [True, False]:
      yield (f'chat: {self.workdir} was not trained on conversations (no {CHAT_TEMPLATE}); leave --chat out, or '
             'fine-tune it: llmjax finetune')
    if '' in self.stop:
      yield 'stop holds an empty text, which would end every completion at once; leave it out'

  @property
  def stop_texts(self):
    r"""The stop texts, with \n and \t typed on a shell replaced by newline and tab."""
    return tuple(s.replace('\\n', '\n').replace('\\t', '\t') for s in self.stop)
