"""The train and optimizer groups of a config.  No JAX here."""

import dataclasses
import re

from llmjax.config import setting

DTYPES = ('float32', 'bfloat16')
REMATS = ('none', 'dots', 'minimal', 'out', 'mlp', 'full', 'offload')
SCHEDULES = ('cosine', 'linear', 'constant', 'wsd', 'rsqrt')


@dataclasses.dataclass(frozen=True)
class TrainSpec:
  """The training loop: steps, batch size, numerics, memory, and intervals."""

  steps: int = setting(1000, 'optimizer steps', minimum=0)
  batch_size: int = setting(32, 'sequences per optimizer step, over all devices and microbatches', minimum=1)
  gradient_accumulation_steps: int = setting(1, 'microbatches that each batch is split into; the loss does not '
                                             'change', minimum=1)
  seed: int = setting(0, 'seed of initial weights, data order and dropout', minimum=0)
  param_dtype: str = setting('float32', 'dtype of the parameters', choices=DTYPES)
  compute_dtype: str = setting('bfloat16', 'dtype of matrix products and activations', choices=DTYPES)
  remat: str = setting('none', 'activations recomputed in the backward pass to save memory. none; dots: all but the '
                       'results of weight products; minimal: norms and activation functions; out: also the output '
                       'projection of attention; mlp: also the MLP; full: all; offload: as minimal, with the rest '
                       'kept in host memory', choices=REMATS)
  attention: str = setting('auto', 'attention implementation; auto: the kernel of the platform',
                           choices=('auto', 'reference', 'blockwise', 'splash', 'cudnn'))
  context_attention: str = setting('ring', 'attention over mesh.context. ring: exchange keys and values around a ring; '
                                   'gather: all-gather them', choices=('ring', 'gather'))
  scan_unroll: int = setting(0, 'layers per iteration of the scan over layers; 0: all on CPUs without remat, else 1',
                             minimum=0)
  objective: str = setting('next_token', "training loss of text and conversations: next_token, or 'module:function' of "
                           'yours, see llmjax/train/objectives.py')
  z_loss: float = setting(0.0, 'coefficient of log(Z)^2 in the loss, Z the softmax denominator', minimum=0.0)
  neftune_alpha: float = setting(0.0, 'NEFTune noise: uniform noise on the embeddings, scaled by alpha / sqrt(length * '
                                 'd_model) (arXiv:2310.05914); 5 is common, 0: none', minimum=0.0)
  log_every: int = setting(10, 'log metrics every so many steps', minimum=1)
  eval_every: int = setting(0, 'evaluate every so many steps; 0: only at the end', minimum=0)
  checkpoint_every: int = setting(0, 'save a checkpoint every so many steps; 0: only at the end', minimum=0)
  sample_every: int = setting(0, 'generate samples every so many steps; 0: only at the end', minimum=0)
  init_from: str = setting('', "initialize the parameters from a run's folder, or from one checkpoint of it",
                           kind='path')
  allow_changes: bool = setting(False, 'resume with other data, optimizer, batch size or loss settings than those of '
                                'the checkpoint; metrics before and after are then not comparable')
  platform: str = setting('', 'refuse to run on another platform; empty: any', choices=('', 'cpu', 'gpu', 'tpu'))
  deterministic: bool = setting(False, 'bitwise reproducible results on the same mesh, devices, versions and config; '
                                'on GPUs sets --xla_gpu_deterministic_ops, which is slower')
  patience: int = setting(0, 'early stopping: evaluations without improvement of stop_metric before the run stops; 0: '
                          'disabled', minimum=0)
  stop_metric: str = setting('eval/validation/loss', 'metric of early stopping, lower is better, such as '
                             'eval/validation/bits_per_byte')
  callbacks: tuple[str, ...] = setting((), "further callbacks of the training loop, each as 'module:Class'; see "
                                       'llmjax/run/callback.py')
  compilation_cache: str = setting('default', "folder of the compilation cache; default: the user's cache folder, "
                                   'none: no cache', kind='path', choices=('default', 'none'))

  def validate(self):
    if self.batch_size % self.gradient_accumulation_steps:
      below = self.batch_size // self.gradient_accumulation_steps * self.gradient_accumulation_steps
      fits = [n for n in (below, below + self.gradient_accumulation_steps) if n]
      yield (f'batch_size={self.batch_size} is not divisible by gradient_accumulation_steps='
             f'{self.gradient_accumulation_steps}; write batch_size={" or ".join(map(str, fits))}')


@dataclasses.dataclass(frozen=True)
class GuardSpec:
  """Handling of bad steps (non-finite values and spikes) and faulty devices.  A bad step is never applied."""

  policy: str = setting('abort', 'after a bad step. abort: stop; skip: continue without it; rollback: return to the '
                        'newest checkpoint and skip batches', choices=('abort', 'skip', 'rollback'))
  spike_threshold: float = setting(0.0, 'robust z-score (median and scaled median absolute deviation) above which a '
                                   'loss or gradient norm is a spike, such as 10; 0: only non-finite values are bad',
                                   minimum=0.0)
  window: int = setting(128, 'good steps over which the median is computed; no spikes are detected before', minimum=8)
  rollback_skip_batches: int = setting(200, 'batches skipped after a rollback, counted from the checkpoint; at least '
                                       'all up to the bad one (arXiv:2204.02311, section 5.1)', minimum=0)
  max_bad_steps: int = setting(10, 'stop after more consecutive bad steps, or more rollbacks to the same checkpoint',
                               minimum=1)
  checksum_every: int = setting(100, 'compare checksums of replicated parameters between devices every so many steps, '
                                'and before each checkpoint, to detect faulty devices; 0: never', minimum=0)
  straggler_deviations: float = setting(5.0, 'scaled median absolute deviations above the median host time per step '
                                        'from which a process is reported as slow; 0: never', minimum=0.0)


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
  """The optimizer and its schedule."""

  name: str = setting('adamw', 'optimizer', choices=('adamw', 'muon', 'lion', 'adafactor', 'sgd'))
  lr: float = setting(3e-4, 'peak learning rate', minimum=0.0)
  warmup_steps: int = setting(0, 'linear warm-up; the first step uses lr / warmup_steps', minimum=0)
  schedule: str = setting('cosine', 'learning-rate schedule after the warm-up', choices=SCHEDULES)
  final_lr_fraction: float = setting(0.1, 'cosine, linear, wsd: learning rate of the last step, as a fraction of lr',
                                     minimum=0.0, maximum=1.0)
  decay_fraction: float = setting(0.2, 'wsd: fraction of the steps after the warm-up in which the learning rate '
                                  'decays', minimum=0.0, maximum=1.0)
  weight_decay: float = setting(0.1, 'decoupled weight decay, times the learning rate, of matrices; not of norms, '
                                'biases and embeddings', minimum=0.0)
  b1: float = setting(0.9, 'decay rate of the first moment', minimum=0.0, maximum=1.0)
  b2: float = setting(0.95, 'decay rate of the second moment', minimum=0.0, maximum=1.0)
  momentum: float = setting(0.95, 'momentum of Muon', minimum=0.0, maximum=1.0)
  epsilon: float = setting(1e-8, 'added to the root of the second moment', minimum=0.0)
  moment_dtype: str = setting('float32', 'dtype in which moments are stored; bfloat16 halves their memory and uses '
                              'stochastic rounding', choices=DTYPES)
  clip_norm: float = setting(1.0, 'maximum global gradient norm; 0: no clipping', minimum=0.0)
  freeze: tuple[str, ...] = setting((), 'regular expressions; parameters whose path matches one are frozen, such as '
                                    'embed or blocks/.*/(query|key)')
  lr_multipliers: dict[str, float] = setting({}, "learning-rate factors by a regular expression of the parameter's "
                                             "path, such as {'embed': 0.1}; the first match counts")
  layer_decay: float = setting(1.0, 'learning-rate factor from each layer to the one below; embeddings get the lowest '
                               '(arXiv:2003.10555, table 6)', minimum=0.0, maximum=1.0)

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
    """Yield settings that are probably mistakes in a run of so many steps."""
    if 0 < steps <= self.warmup_steps:
      yield (f'warning: optimizer.warmup_steps={self.warmup_steps} covers all of train.steps={steps}, so the learning '
             f'rate never decays; write optimizer.warmup_steps={steps // 10} for a tenth')
