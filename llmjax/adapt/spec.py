"""The adapter group of a config.  No JAX here."""

import dataclasses
import re

from llmjax.config import setting

KINDS = ('lora', 'rslora', 'dora')
FORMATS = ('int8', 'nf4')


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
  """Low-rank matrices that train in place of the weights of train.init_from, which stay as they are."""

  kind: str = setting('', 'train adapters of this kind; empty: train all weights', choices=('', *KINDS))
  rank: int = setting(16, 'columns of A and rows of B', minimum=1)
  alpha: float = setting(32.0, 'the product A B counts alpha / rank times; rslora: alpha / sqrt(rank)', minimum=0.0)
  dropout: float = setting(0.0, "rate on the adapters' input, while training", minimum=0.0, maximum=0.9)
  targets: tuple[str, ...] = setting(
      ('*/attention/*', '*/mlp/*'), 'matrices that get an adapter, by path: patterns such as */attention/query; '
      're:... is a regular expression of the whole path')
  quantize: str = setting('', "keep the blocks' frozen matrices as nf4 (4.2 bits a weight) or int8; empty: as they "
                          'are', choices=('', *FORMATS))
  name: str = setting('default', 'of this adapter')

  @property
  def scale(self):
    """Returns the factor of A B: arXiv:2106.09685, section 4.1; rslora: arXiv:2312.03732, eq. 4."""
    return self.alpha / (self.rank**0.5 if self.kind == 'rslora' else self.rank)

  def problems(self):
    if not self.targets:
      yield "targets is empty; write patterns of weights to adapt, such as */attention/*"
    for pattern in self.targets:
      if pattern.startswith('re:'):
        try:
          re.compile(pattern[3:])
        except re.error as e:
          yield f'targets: {pattern!r} is no regular expression: {e}'
    if not re.fullmatch(r'[A-Za-z0-9_.-]+', self.name) or '..' in self.name:
      yield f'name={self.name!r} must be of letters, digits, _, - and .'
    if self.quantize and not self.kind:
      yield f'quantize={self.quantize} is of a frozen base; set adapter.kind, to lora for example'
