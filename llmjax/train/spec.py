"""The train and optimizer groups of a config.  No JAX here."""

import dataclasses
import re

from llmjax.config import setting

DTYPES = ('float32', 'bfloat16')
REMATS = ('none', 'dots', 'minimal', 'out', 'mlp', 'full', 'offload')
SCHEDULES = ('cosine', 'linear', 'constant', 'wsd', 'rsqrt')


@dataclasses.dataclass(frozen=True)
class TrainSpec:
  """What a run does and how often."""

  steps: int = setting(1000, 'optimizer steps', minimum=0)
  batch_size: int = setting(32, 'rows of a global batch, over all devices', minimum=1)
  gradient_accumulation_steps: int = setting(1, 'microbatches that each batch is split into; the loss does not '
                                             'change', minimum=1)
  seed: int = setting(0, 'of initial weights, data order and dropout', minimum=0)
  param_dtype: str = setting('float32', 'of parameters', choices=DTYPES)
  compute_dtype: str = setting('bfloat16', 'of products and activations', choices=DTYPES)
  remat: str = setting('none', 'what the backward pass computes again to save memory. none: nothing; dots: '
                       'all but weight products; minimal: norms and activations; out: those and the product after '
                       'attention; mlp: norms, activations and the MLP; full: everything; offload: as minimal, kept '
                       'in host memory', choices=REMATS)
  attention: str = setting('auto', 'attention kernel; auto follows the platform',
                           choices=('auto', 'reference', 'blockwise', 'splash', 'cudnn'))
  context_attention: str = setting('ring', 'along mesh.context, keys and values go round a ring, or each device '
                                   'gathers all of them', choices=('ring', 'gather'))
  scan_unroll: int = setting(0, 'layers unrolled in each turn of the scan; 0: on CPU without remat all, '
                             'else 1', minimum=0)
  objective: str = setting('next_token', "training loss of text and conversations: next_token, or 'module:function' of "
                           'yours, see llmjax/train/objectives.py')
  z_loss: float = setting(0.0, 'weight of log(Z)^2 in the loss', minimum=0.0)
  neftune_alpha: float = setting(0.0, 'uniform noise on the embeddings while training, of this size over the root of '
                                 "the document's length times d_model (arXiv:2310.05914); 5 is usual, 0: none",
                                 minimum=0.0)
  log_every: int = setting(10, 'steps between lines in metrics.jsonl', minimum=1)
  eval_every: int = setting(0, 'steps between evaluations; 0: only at the end', minimum=0)
  checkpoint_every: int = setting(0, 'steps between checkpoints; 0: only at the end', minimum=0)
  sample_every: int = setting(0, 'steps between samples; 0: only at the end', minimum=0)
  init_from: str = setting('', "a run's folder, or one checkpoint of it, whose parameters to start from",
                           kind='path')
  allow_changes: bool = setting(False, 'resume with other settings of data, optimizer, batch size or loss than the '
                                'checkpoint was trained with, after which logged numbers mean something else')
  platform: str = setting('', 'refuse to start elsewhere; empty: whatever JAX finds',
                          choices=('', 'cpu', 'gpu', 'tpu'))
  deterministic: bool = setting(False, 'the same run gives the same bits. Promised for the same mesh, devices, '
                                'versions and config; another mesh agrees to rounding. GPU: sets '
                                '--xla_gpu_deterministic_ops, which is slower; CPU needs no flag, and TPU has none')
  patience: int = setting(0, 'evaluations without a new best stop_metric after which the run stops; 0: never',
                          minimum=0)
  stop_metric: str = setting('eval/validation/loss', 'what patience watches, such as '
                             'eval/validation/bits_per_byte; less is better')
  callbacks: tuple[str, ...] = setting((), "further callbacks of the training loop, each as 'module:Class'; see "
                                       'llmjax/run/callback.py')
  compilation_cache: str = setting('default', "folder of compiled programs: default is the user's cache "
                                   'directory, none turns it off', kind='path', choices=('default', 'none'))

  def validate(self):
    if self.batch_size % self.gradient_accumulation_steps:
      below = self.batch_size // self.gradient_accumulation_steps * self.gradient_accumulation_steps
      fits = [n for n in (below, below + self.gradient_accumulation_steps) if n]
      yield (f'batch_size={self.batch_size} is not divisible by gradient_accumulation_steps='
             f'{self.gradient_accumulation_steps}; write batch_size={" or ".join(map(str, fits))}')


@dataclasses.dataclass(frozen=True)
class GuardSpec:
  """What is done about steps and devices that go wrong.  A bad step is never applied."""

  policy: str = setting('abort', 'after a bad step (loss or gradient not finite, or a spike) abort: stop; skip: '
                        'go on without it; rollback: go on from the last checkpoint with other batches',
                        choices=('abort', 'skip', 'rollback'))
  spike_threshold: float = setting(0.0, 'deviations (median absolute, scaled) above the median from which a loss '
                                   'or gradient norm is a spike, 10 for example; 0: only what is not finite is '
                                   'bad', minimum=0.0)
  window: int = setting(128, 'good steps that the median is taken over; no spike is found before there are so '
                        'many', minimum=8)
  rollback_skip_batches: int = setting(200, 'batches that are left out after a rollback, counted from the '
                                       'checkpoint; all up to the bad one always are (arXiv:2204.02311, section '
                                       '5.1)', minimum=0)
  max_bad_steps: int = setting(10, 'bad steps in a row, or rollbacks to one checkpoint, after which the run '
                               'stops', minimum=1)
  checksum_every: int = setting(100, 'steps between comparisons of the parameters that several devices hold, to '
                                'find a device that computes wrongly; also before a checkpoint; 0: never',
                                minimum=0)
  straggler_deviations: float = setting(5.0, 'deviations above the median, in time that its host takes for a '
                                        'step, from which a process is called slow; 0: never', minimum=0.0)


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
  """The optimizer and its schedule."""

  name: str = setting('adamw', 'the update rule', choices=('adamw', 'muon', 'lion', 'adafactor', 'sgd'))
  lr: float = setting(3e-4, 'peak learning rate', minimum=0.0)
  warmup_steps: int = setting(0, 'steps of linear rise to lr: the first uses lr / warmup_steps', minimum=0)
  schedule: str = setting('cosine', 'shape after the warm-up', choices=SCHEDULES)
  final_lr_fraction: float = setting(0.1, 'cosine, linear, wsd: learning rate of the last step, as a part of lr',
                                     minimum=0.0, maximum=1.0)
  decay_fraction: float = setting(0.2, 'wsd: part of the steps after the warm-up in which the rate falls',
                                  minimum=0.0, maximum=1.0)
  weight_decay: float = setting(0.1, 'decoupled, times the learning rate, with every optimizer; of matrices: norms, '
                                'biases and the embedding table keep their size', minimum=0.0)
  b1: float = setting(0.9, 'decay of the first moment', minimum=0.0, maximum=1.0)
  b2: float = setting(0.95, 'decay of the second moment', minimum=0.0, maximum=1.0)
  momentum: float = setting(0.95, "Muon's decay of the gradient", minimum=0.0, maximum=1.0)
  epsilon: float = setting(1e-8, 'added to the root of the second moment', minimum=0.0)
  moment_dtype: str = setting('float32', 'of the moments between steps; bfloat16 halves their memory and is '
                              'rounded stochastically', choices=DTYPES)
  clip_norm: float = setting(1.0, 'largest global norm of the gradient; 0: no clipping', minimum=0.0)
  freeze: tuple[str, ...] = setting((), 'parameters whose path matches one of these patterns stay as they are and have '
                                    'no optimizer state, such as embed or blocks/.*/(query|key)')
  lr_multipliers: dict[str, float] = setting({}, "factors of the learning rate by a regular expression of the "
                                             "parameter's path, such as {'embed': 0.1}; the first match counts")
  layer_decay: float = setting(1.0, 'factor on the learning rate from each layer to the one below, the embeddings '
                               'lowest (arXiv:2003.10555, table 6)', minimum=0.0, maximum=1.0)

  def validate(self):
    for name, patterns in (('freeze', self.freeze), ('lr_multipliers', self.lr_multipliers)):
      for pattern in patterns:
        try:
          re.compile(pattern)
        except re.error as e:
          yield f'{name}: {pattern!r} is not a regular expression ({e}); write a part of a path, such as embed'
    for pattern, factor in self.lr_multipliers.items():
      if factor < 0:
        yield f'lr_multipliers[{pattern}]={factor:g} must be at least 0; to freeze parameters, use freeze'

  def warnings(self, steps):
    """Yields what is probably not meant in a run of so many steps."""
    if 0 < steps <= self.warmup_steps:
      yield (f'warning: optimizer.warmup_steps={self.warmup_steps} is all of train.steps={steps}, so the learning rate '
             f'never falls; write optimizer.warmup_steps={steps // 10} for a tenth')
