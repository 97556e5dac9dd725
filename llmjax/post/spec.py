"""Config groups of post-training: `preference`, `reward`, `policy`, `rl` and `distill`.  Imports no JAX."""

import dataclasses
import re

from llmjax import extensions
from llmjax.config import ConfigError, setting

PAIR_LOSSES = ('sigmoid', 'robust', 'hinge', 'ipo', 'exo_pair', 'nca_pair', 'bco_pair', 'sppo_hard', 'aot',
               'aot_unpaired', 'apo_zero', 'apo_down', 'discopop', 'sigmoid_norm', 'sft', 'cpo', 'simpo', 'orpo')
UNPAIRED_LOSSES = ('kto', 'apo_zero_unpaired')
# Losses that compare the pairs of a batch with one another, and so depend on the microbatch.
BATCH_LOSSES = ('aot', 'aot_unpaired', 'kto')
REFERENCE_FREE_LOSSES = ('sft', 'cpo', 'simpo', 'orpo')
DIVERGENCES = ('reverse_kl', 'forward_kl', 'js', 'alpha')
# Losses of the difference of two implicit rewards, which other divergences may define.
DIVERGENCE_LOSSES = ('sigmoid', 'robust', 'hinge', 'ipo', 'exo_pair', 'discopop', 'sigmoid_norm')
SMOOTHED_LOSSES = ('sigmoid', 'robust', 'exo_pair', 'aot', 'aot_unpaired', 'cpo', 'simpo')


@dataclasses.dataclass(frozen=True)
class PreferenceSpec:
  """Preference optimization (DPO and others) on pairs of completions or on single labelled completions."""

  loss: str = setting('sigmoid', 'preference loss: sigmoid is DPO, with label_smoothing conservative DPO; kto and '
                      'apo_zero_unpaired take unpaired completions; orpo, simpo, cpo and sft need no reference model',
                      choices=PAIR_LOSSES + UNPAIRED_LOSSES)
  reference: str = setting('precomputed', 'reference model, the initial policy: compute its log-probabilities before '
                           'training (precomputed), keep a frozen copy in memory (copy), or use the base model of the '
                           'adapters (disable_adapter)', choices=('precomputed', 'copy', 'disable_adapter'))
  beta: float = setting(0.1, 'strength of the KL constraint to the reference model; lower values let the policy '
                        'deviate more (ipo: tau; orpo: weight of the odds ratio)', minimum=0.0)
  label_smoothing: float = setting(0.0, 'assumed probability that a label is wrong (sigmoid, robust, aot, cpo, simpo); '
                                   'exo_pair: epsilon', minimum=0.0, maximum=0.5)
  divergence: str = setting('reverse_kl', 'f-divergence from the reference model (arXiv:2309.16240)',
                            choices=DIVERGENCES)
  alpha: float = setting(0.5, 'coefficient of the alpha divergence; 1 is reverse_kl', minimum=0.0)
  ld_alpha: float = setting(1.0, 'weight of the tokens beyond the length of the shorter completion (LD-DPO, '
                            'arXiv:2409.06411); 1: full weight', minimum=0.0, maximum=1.0)
  simpo_gamma: float = setting(0.5, 'simpo: target reward margin', minimum=0.0)
  discopop_tau: float = setting(0.05, 'discopop: temperature of the log-ratio modulation', minimum=0.0)
  sft_weight: float = setting(0.0, 'weight of an added negative log-likelihood per token of the chosen completion '
                              '(arXiv:2404.19733); orpo includes it with weight 1', minimum=0.0)
  desirable_weight: float = setting(1.0, 'kto: weight of the losses of desirable completions', minimum=0.0)
  undesirable_weight: float = setting(1.0, 'kto: weight of the losses of undesirable completions', minimum=0.0)

  def validate(self):
    if not self.beta:
      yield 'beta=0.0 makes the loss constant; write beta=0.1'
    if self.loss == 'exo_pair' and not self.label_smoothing:
      yield 'label_smoothing=0.0 makes exo_pair infinite; write label_smoothing=0.001'
    if self.loss == 'robust' and self.label_smoothing == 0.5:
      yield 'label_smoothing=0.5 makes the labels uninformative; write less, such as label_smoothing=0.1'
    if self.label_smoothing and self.loss not in SMOOTHED_LOSSES:
      yield (f'label_smoothing={self.label_smoothing} is not used by loss={self.loss}; leave it out, or write loss='
             f'{" or ".join(SMOOTHED_LOSSES)}')
    if self.divergence != 'reverse_kl' and self.loss not in DIVERGENCE_LOSSES:
      yield (f'divergence={self.divergence} is not used by loss={self.loss}; leave it out, or write loss='
             f'{" or ".join(DIVERGENCE_LOSSES)}')
    if self.loss == 'discopop' and not self.discopop_tau:
      yield 'discopop_tau=0.0 divides by zero; write discopop_tau=0.05'


@dataclasses.dataclass(frozen=True)
class RewardModelSpec:
  """Reward modelling: an outcome reward model from pairs, or a process reward model from step labels."""

  center_rewards_coef: float = setting(0.01, 'coefficient of (chosen + rejected)^2, which keeps the mean reward near 0 '
                                       '(arXiv:2312.09244); 0: off', minimum=0.0)
  scores: str = setting('', 'what the model scores: completions (from pairs) or their steps (from step labels); empty: '
                        'according to the data', choices=('', 'completions', 'steps'))


# Fields of the named policy losses; a config may override each.
POLICY_LOSSES = {
    'ppo': {'loss_aggregation': 'token', 'advantage_estimator': 'gae'},  # arXiv:1707.06347
    'grpo': {'loss_aggregation': 'sequence'},  # arXiv:2402.03300, eq. 3
    'bnpo': {'loss_aggregation': 'token'},  # GRPO averaged over all tokens
    'dapo': {'loss_aggregation': 'token', 'clip_high': 0.28},  # arXiv:2503.14476
    'dr_grpo': {'loss_aggregation': 'constant', 'advantage_normalization': 'none'},  # arXiv:2503.20783
    'gspo': {'importance_sampling': 'sequence', 'loss_aggregation': 'sequence', 'clip_low': 3e-4,
             'clip_high': 4e-4},  # arXiv:2507.18071, section 5.1
    'rloo': {'importance_sampling': 'trajectory', 'loss_aggregation': 'sequence',
             'advantage_estimator': 'leave_one_out', 'advantage_normalization': 'none'},  # arXiv:2402.14740
    'cispo': {'surrogate': 'cispo', 'loss_aggregation': 'token', 'clip_high': 4.0},  # arXiv:2506.13585
    'sapo': {'surrogate': 'sapo', 'loss_aggregation': 'sequence'},  # arXiv:2511.20347
    'vespo': {'surrogate': 'vespo', 'loss_aggregation': 'token'},  # arXiv:2602.10693
}


@dataclasses.dataclass(frozen=True)
class PolicySpec:
  """The policy loss: advantage estimator, surrogate objective, importance sampling and aggregation over tokens."""

  name: str = setting('grpo', 'policy loss that sets the defaults of this group', choices=tuple(POLICY_LOSSES))
  advantage_estimator: str = setting('group_mean', "baseline of the advantages: the mean reward of the prompt's "
                                     'completions (GRPO), the mean of the other ones (leave_one_out, RLOO), or a value '
                                     'head with generalized advantage estimation (gae, PPO)',
                                     choices=('group_mean', 'leave_one_out', 'gae'))
  advantage_normalization: str = setting('group', 'divide advantages by the standard deviation of the rewards of each '
                                         'group, of the batch, or not at all', choices=('group', 'batch', 'none'))
  surrogate: str = setting('clip', 'surrogate objective of the importance ratio and the advantage: clip (PPO), cispo, '
                           'sapo, vespo, or reinforce', choices=('clip', 'cispo', 'sapo', 'vespo', 'reinforce'))
  importance_sampling: str = setting('token', 'importance ratio per token; per sequence as the geometric mean over '
                                     'tokens (GSPO); per trajectory as their product (RLOO)',
                                     choices=('token', 'sequence', 'trajectory'))
  loss_aggregation: str = setting('token', 'mean over all tokens (token, DAPO); mean over sequences of the mean over '
                                  'their tokens (sequence, GRPO), of the sum over their tokens divided by '
                                  'rl.max_new_tokens (constant, Dr. GRPO), or of the sum (sum)',
                                  choices=('token', 'sequence', 'constant', 'sum'))
  clip_low: float = setting(0.2, 'clip importance ratios below 1 - clip_low', minimum=0.0, maximum=1.0)
  clip_high: float = setting(0.0, 'clip importance ratios above 1 + clip_high; 0: the same as clip_low', minimum=0.0)
  dual_clip: float = setting(0.0, 'upper bound of importance ratios where the advantage is negative (two-sided '
                             'clipping, arXiv:2505.07291); 0: none', minimum=0.0)
  kl_coef: float = setting(0.0, 'coefficient of the KL penalty to the reference model in the loss', minimum=0.0)
  kl_estimator: str = setting('k3', 'estimator of the KL in the loss', choices=('k1', 'k2', 'k3', 'abs'))
  entropy_coef: float = setting(0.0, 'coefficient of the entropy bonus', minimum=0.0)
  sapo_temperatures: tuple[float, ...] = setting((1.0, 1.05), 'sapo: temperatures for positive and for other '
                                                 'advantages')
  vespo_k_lambda: tuple[float, ...] = setting((2.0, 3.0, 3.0, 2.0), 'vespo: k and lambda for advantages of at least 0, '
                                              'then for negative ones')
  gamma: float = setting(1.0, 'gae: discount factor', minimum=0.0, maximum=1.0)
  gae_lambda: float = setting(0.95, 'gae: lambda of the bias-variance trade-off; 0 relies on the value head, 1 on the '
                              'rewards', minimum=0.0, maximum=1.0)
  value_coef: float = setting(0.1, 'gae: coefficient of the value loss', minimum=0.0)
  value_clip: float = setting(0.2, 'gae: clip values to this distance from those of the rollout; 0: no clipping',
                              minimum=0.0)
  whiten_rewards: bool = setting(False, 'gae: normalize rewards to variance 1')
  whiten_advantages: bool = setting(True, 'gae: normalize advantages to mean 0 and variance 1')

  @classmethod
  def base(cls, values):
    """Return the fields that the loss named in `values` sets."""
    name = values.get('name', 'grpo')
    return POLICY_LOSSES.get(name, {}) if isinstance(name, str) else {}

  @property
  def high(self):
    return self.clip_high or self.clip_low

  def validate(self):
    if len(self.sapo_temperatures) != 2 or min(self.sapo_temperatures) <= 0:
      yield f'sapo_temperatures={self.sapo_temperatures} must be two positive numbers, such as 1.0,1.05'
    if len(self.vespo_k_lambda) != 4:
      yield f'vespo_k_lambda={self.vespo_k_lambda} must be four numbers, such as 2.0,3.0,3.0,2.0'


REWARDS = ('math', 'exact', 'doctest', 'regex', 'format', 'length', 'model')


@dataclasses.dataclass(frozen=True)
class RlSpec:
  """Reinforcement learning: sampling, rewards, KL control."""

  prompts_per_iteration: int = setting(16, 'prompts per iteration', minimum=1)
  num_generations: int = setting(8, 'completions sampled per prompt (the group)', minimum=1)
  epochs: int = setting(1, 'passes over the completions of an iteration, in minibatches of train.batch_size', minimum=1)
  max_new_tokens: int = setting(64, 'maximum number of tokens of a completion, including the end token', minimum=1)
  temperature: float = setting(1.0, 'temperature of the logits in sampling and in the loss', minimum=0.01)
  top_p: float = setting(1.0, 'nucleus sampling: sample from the most likely tokens with this total probability; below '
                         '1 the samples are off-policy', minimum=0.01, maximum=1.0)
  top_k: int = setting(0, 'sample from this many most likely tokens; 0: all. Above 0 the samples are off-policy',
                       minimum=0)
  rewards: dict[str, float] = setting(
      {'math': 1.0}, 'rewards with their weights: built-in names, or my_module:my_reward, a function of the lists '
      'prompts, completions and, by keyword, answer and the other columns of the records, that returns one number per '
      'completion', kind='extension', choices=REWARDS)
  pattern: str = setting('', 'reward regex: pattern that the completion must contain; {answer} is the gold answer')
  format: str = setting('', 'reward format: pattern that the whole completion must match')
  length: int = setting(0, 'reward length: target number of tokens; the reward falls linearly to 0 at none and at '
                        'twice as many', minimum=0)
  reward_model: str = setting('', 'reward model: run folder of the reward model', kind='path')
  step_score: str = setting('min', 'reward model, for a process reward model: score of a completion from those of its '
                            'steps', choices=('min', 'product'))
  overlong_tokens: int = setting(0, 'length of the soft overlong punishment: the reward falls by 1 over this many '
                                 'tokens before max_new_tokens (DAPO); 0: off', minimum=0)
  missing_eos_penalty: float = setting(0.0, 'subtracted from the reward of a completion without an end token',
                                       minimum=0.0)
  mask_truncated_completions: bool = setting(False, 'exclude completions without an end token from the loss')
  kl_coef: float = setting(0.0, 'coefficient of the KL penalty to the reference model in the rewards (PPO); '
                           'policy.kl_coef puts it into the loss', minimum=0.0)
  kl_estimator: str = setting('k1', 'estimator of the KL in the rewards', choices=('k1', 'k2', 'k3', 'abs'))
  kl_target: float = setting(0.0, 'adapt kl_coef to this KL per sequence, in nats; 0: constant kl_coef', minimum=0.0)
  kl_horizon: int = setting(10_000, 'sequences over which the adaptive kl_coef changes', minimum=1)
  reference: bool = setting(True, 'keep the initial policy as reference model, for the KL divergence')
  max_resample_rounds: int = setting(1, 'how many times prompts whose completions all have the same reward are '
                                     'replaced by other prompts (dynamic sampling of DAPO); 1: never', minimum=1)
  # Measured on 1.3 M parameters in float32: 4e-7 on average and 6e-6 at most; each of the two differs by up to 1.3e-5
  # from float64.  A wrong temperature, mask or position differs by thousands of times as much.
  logprob_tolerance: float = setting(1e-5, 'largest mean difference between log-probabilities of the sampler and the '
                                     'trainer, relative where they are above 1; single ones may differ by 100 times '
                                     'that. More is an error with compute_dtype=float32', minimum=0.0)

  @property
  def rows(self):
    """Sequences of an iteration."""
    return self.prompts_per_iteration * self.num_generations

  def validate(self):
    if not self.rewards:
      yield f'rewards is empty; write some of {", ".join(REWARDS)}, such as rewards.math=1'
    for name in self.rewards:
      if name not in REWARDS:
        try:
          extensions.load(name, 'rewards')
        except ConfigError as e:
          yield from e.problems
    for name, field in (('regex', 'pattern'), ('format', 'format'), ('length', 'length'), ('model', 'reward_model')):
      value = getattr(self, field)
      if name in self.rewards and not value:
        yield f'{field} is missing: rewards has {name}'
      if value and name not in self.rewards:
        yield f'{field} is not used by these rewards; add rewards.{name}=1, or leave it out'
    for field in ('pattern', 'format'):
      try:
        re.compile(getattr(self, field).replace('{answer}', 'x'))
      except re.error as e:
        yield f'{field} is no regular expression: {e}'
    if self.overlong_tokens > self.max_new_tokens:
      yield (f'overlong_tokens={self.overlong_tokens} is more than max_new_tokens={self.max_new_tokens}; write '
             f'{max(self.max_new_tokens // 4, 1)} for a quarter')
    if self.kl_target and not self.kl_coef:
      yield f'kl_target={self.kl_target} needs an initial kl_coef, such as kl_coef=0.1'
    if not self.reference and self.kl_coef:
      yield 'reference=False leaves no reference model for the KL penalty; write kl_coef=0, or reference=True'


# Which layers of the teacher initialize those of the student; see `DistillSpec.layers`.
LAYER_CHOICES = ('', 'every_2nd', 'first', 'evenly_spaced')


@dataclasses.dataclass(frozen=True)
class DistillSpec:
  """Knowledge distillation from a teacher model, and initialization from its layers."""

  teacher: str = setting('', 'teacher model: a run folder, or one of its checkpoints; empty: no distillation',
                         kind='path')
  loss: str = setting('forward_kl', 'divergence between teacher and student: forward_kl is mode-covering, reverse_kl '
                      'mode-seeking, jsd interpolates (GKD, arXiv:2306.13649); hinton adds the cross-entropy of the '
                      'data: alpha T^2 forward_kl + (1 - alpha) cross-entropy (arXiv:1503.02531)',
                      choices=('forward_kl', 'reverse_kl', 'jsd', 'hinton'))
  beta: float = setting(0.5, 'jsd: interpolation between forward_kl (0) and reverse_kl (1)', minimum=0.0, maximum=1.0)
  temperature: float = setting(1.0, 'softmax temperature of both models; higher values give unlikely tokens more '
                               'weight', minimum=0.0)
  alpha: float = setting(0.5, 'hinton: weight of the divergence; 1 - alpha is that of the cross-entropy', minimum=0.0,
                         maximum=1.0)
  hidden_weight: float = setting(0.0, 'weight of an added mean squared error between the final hidden states; for '
                                 'different widths a projection of the student is trained with it', minimum=0.0)
  cosine_weight: float = setting(0.0, 'weight of an added cosine distance between the final hidden states (DistilBERT, '
                                 'arXiv:1910.01108)', minimum=0.0)
  top_k: int = setting(0, "cache the teacher's top k log-probabilities of every token in the run folder, 8 k bytes per "
                       'token, instead of keeping the teacher in memory; 0: keep it in memory', minimum=0)
  on_policy_fraction: float = setting(0.0, 'fraction of batches whose completions the student generates itself '
                                      '(lambda of GKD, arXiv:2306.13649, algorithm 1); 0: all from the data',
                                      minimum=0.0, maximum=1.0)
  max_new_tokens: int = setting(32, 'on-policy batches: maximum number of tokens of a completion, including the end '
                                'token', minimum=1)
  init: str = setting('', 'initialize the student with the embeddings and some layers of the teacher: every_2nd from '
                      'the lowest (DistilBERT), the first ones, or evenly_spaced from the lowest to the highest; '
                      'empty: random initialization', choices=LAYER_CHOICES)

  @property
  def compares_hidden(self):
    return bool(self.hidden_weight or self.cosine_weight)

  def layers(self, num_student, num_teacher):
    """Return the indices of the teacher's layers that initialize those of the student."""
    if self.init == 'every_2nd':
      return list(range(0, num_teacher, 2))[:num_student]
    if self.init == 'first' or num_student == 1:
      return list(range(num_student))
    return [round(i * (num_teacher - 1) / (num_student - 1)) for i in range(num_student)]

  def validate(self):
    if not self.teacher:
      if changed := [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]:
        yield f'teacher is missing, which {changed[0]} needs; write distill.teacher=runs/big'
      return
    if not self.temperature:
      yield 'temperature=0.0 leaves one token; write temperature=1.0'
    if self.top_k and self.loss in ('reverse_kl', 'jsd'):
      yield (f'loss={self.loss} needs the whole distribution of the teacher; write loss=forward_kl or loss=hinton, or '
             'top_k=0')
    if self.on_policy_fraction and self.top_k:
      yield 'top_k caches the teacher on the data, not on completions of the student; write top_k=0'
    if self.on_policy_fraction and self.loss == 'hinton':
      yield ('loss=hinton would train the student on its own completions as data; write loss=forward_kl, reverse_kl or '
             'jsd')
    if self.top_k and self.compares_hidden:
      yield 'top_k caches no hidden states, which hidden_weight and cosine_weight compare; write top_k=0'
