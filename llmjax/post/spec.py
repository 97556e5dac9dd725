"""The groups `preference`, `policy`, `rl` and `distill` of a config.  No JAX here."""

import dataclasses
import re

from llmjax.config import setting

PAIR_LOSSES = ('sigmoid', 'robust', 'hinge', 'ipo', 'exo_pair', 'nca_pair', 'bco_pair', 'sppo_hard', 'aot',
               'aot_unpaired', 'apo_zero', 'apo_down', 'discopop', 'sigmoid_norm', 'sft', 'cpo', 'simpo', 'orpo')
UNPAIRED_LOSSES = ('kto', 'apo_zero_unpaired')
# What sees more than one pair at a time: the loss then depends on which rows a microbatch holds.
BATCH_LOSSES = ('aot', 'aot_unpaired', 'kto')
# What needs no reference model.
FREE_LOSSES = ('sft', 'cpo', 'simpo', 'orpo')
# What is made of the difference of two scores, and so takes another divergence, or flipped labels.
DIVERGENCES = ('reverse_kl', 'forward_kl', 'js', 'alpha')
DIVERGENCE_LOSSES = ('sigmoid', 'robust', 'hinge', 'ipo', 'exo_pair', 'discopop', 'sigmoid_norm')
SMOOTHED_LOSSES = ('sigmoid', 'robust', 'exo_pair', 'aot', 'aot_unpaired', 'cpo', 'simpo')


@dataclasses.dataclass(frozen=True)
class PreferenceSpec:
  """What is learnt from pairs of a better and a worse answer, or from answers that are good or bad."""

  loss: str = setting('sigmoid', 'sigmoid is DPO, with label_smoothing cDPO; kto and apo_zero_unpaired take single '
                      'answers; orpo, simpo, cpo and sft need no reference', choices=PAIR_LOSSES + UNPAIRED_LOSSES)
  reference: str = setting('precomputed', 'the model that training begins with: its log-probabilities of all answers '
                           'beforehand (precomputed), a second model in memory (copy), or the base of the adapters '
                           'that are trained (adapters_off)', choices=('precomputed', 'copy', 'adapters_off'))
  beta: float = setting(0.1, 'how much a change of log-probability counts; less moves the model further (ipo: tau; '
                        'orpo: weight of the odds ratio)', minimum=0.0)
  label_smoothing: float = setting(0.0, 'part of the labels that are wrong (sigmoid, robust, aot, cpo, simpo), or '
                                   "exo_pair's epsilon", minimum=0.0, maximum=0.5)
  divergence: str = setting('reverse_kl', 'from the reference (arXiv:2309.16240)', choices=DIVERGENCES)
  alpha: float = setting(0.5, 'of the alpha divergence; 1 is reverse_kl', minimum=0.0)
  length_weight: float = setting(1.0, 'of the tokens by which one answer is longer than the other (LD-DPO, '
                                 'arXiv:2409.06411); 1: like all others', minimum=0.0, maximum=1.0)
  margin: float = setting(0.5, 'simpo: gamma, how far apart the answers are to be', minimum=0.0)
  discopop_tau: float = setting(0.05, 'discopop: temperature of its mixture', minimum=0.0)
  sft_weight: float = setting(0.0, "of the better answer's negative log-likelihood per token, as an added term "
                              '(arXiv:2404.19733); orpo has it with weight 1 anyway', minimum=0.0)
  desirable_weight: float = setting(1.0, 'kto: of good answers', minimum=0.0)
  undesirable_weight: float = setting(1.0, 'kto: of bad answers', minimum=0.0)

  def validate(self):
    if not self.beta:
      yield 'beta=0.0 leaves nothing to learn; write beta=0.1'
    if self.loss == 'exo_pair' and not self.label_smoothing:
      yield 'label_smoothing=0.0 makes exo_pair infinite; write label_smoothing=0.001'
    if self.loss == 'robust' and self.label_smoothing == 0.5:
      yield 'label_smoothing=0.5 says that labels tell nothing; write less, such as label_smoothing=0.1'
    if self.label_smoothing and self.loss not in SMOOTHED_LOSSES:
      yield (f'label_smoothing={self.label_smoothing} has no part in loss={self.loss}; leave it out, or write loss='
             f'{" or ".join(SMOOTHED_LOSSES)}')
    if self.divergence != 'reverse_kl' and self.loss not in DIVERGENCE_LOSSES:
      yield (f'divergence={self.divergence} has no part in loss={self.loss}; leave it out, or write loss='
             f'{" or ".join(DIVERGENCE_LOSSES)}')
    if self.loss == 'discopop' and not self.discopop_tau:
      yield 'discopop_tau=0.0 divides by zero; write discopop_tau=0.05'


# What papers call a policy loss; a config's own fields come on top.
NAMED = {
    'ppo': {'loss_aggregation': 'token', 'advantages': 'gae'},  # arXiv:1707.06347
    'grpo': {'loss_aggregation': 'sequence'},  # arXiv:2402.03300, eq. 3
    'bnpo': {'loss_aggregation': 'token'},  # GRPO over all tokens
    'dapo': {'loss_aggregation': 'token', 'clip_high': 0.28},  # arXiv:2503.14476
    'dr_grpo': {'loss_aggregation': 'constant', 'advantage_normalization': 'none'},  # arXiv:2503.20783
    'gspo': {'importance_sampling': 'sequence', 'loss_aggregation': 'sequence', 'clip_low': 3e-4,
             'clip_high': 4e-4},  # arXiv:2507.18071, section 5.1
    'rloo': {'importance_sampling': 'trajectory', 'loss_aggregation': 'sequence', 'advantages': 'others',
             'advantage_normalization': 'none'},  # arXiv:2402.14740
    'cispo': {'surrogate': 'cispo', 'loss_aggregation': 'token', 'clip_high': 4.0},  # arXiv:2506.13585
    'sapo': {'surrogate': 'sapo', 'loss_aggregation': 'sequence'},  # arXiv:2511.20347
    'vespo': {'surrogate': 'vespo', 'loss_aggregation': 'token'},  # arXiv:2602.10693
}


@dataclasses.dataclass(frozen=True)
class RewardModelSpec:
  """How a reward model learns from pairs.  Of steps it learns the cross-entropy of their labels alone."""

  center_rewards_coef: float = setting(0.01, 'weight of (chosen + rejected)^2, which holds the mean score at 0 '
                            '(arXiv:2312.09244); 0: none', minimum=0.0)
  scores: str = setting('', "what gets a score: answers (of pairs) or steps; '': what the data holds",
                        choices=('', 'answers', 'steps'))


@dataclasses.dataclass(frozen=True)
class PolicySpec:
  """The policy loss: advantages, which surrogate, of which ratio, averaged how."""

  name: str = setting('grpo', 'start from this loss; other fields change it', choices=tuple(NAMED))
  advantages: str = setting('mean', "how much better than expected: than the mean of a prompt's answers (GRPO), than "
                            'the mean of the others (RLOO), or than a value head says (gae, PPO)',
                            choices=('mean', 'others', 'gae'))
  advantage_normalization: str = setting('group', 'divide advantages by the standard deviation of the '
                                         'rewards of each group, of the batch, or not at all',
                                         choices=('group', 'batch', 'none'))
  surrogate: str = setting('clip', 'what a ratio and an advantage give: clip (PPO), cispo, sapo, vespo, or reinforce',
                           choices=('clip', 'cispo', 'sapo', 'vespo', 'reinforce'))
  importance_sampling: str = setting('token', 'importance ratio per token; per sequence as the geometric mean over '
                                     'tokens (GSPO); per trajectory as their product (RLOO)',
                                     choices=('token', 'sequence', 'trajectory'))
  loss_aggregation: str = setting('token', "of all tokens alike (DAPO); of sequences, each its tokens' mean (GRPO); of "
                         "sequences, each its tokens' sum over max_new_tokens (constant, Dr. GRPO); of sequences, each "
                         "its tokens' sum (sum)", choices=('token', 'sequence', 'constant', 'sum'))
  clip_low: float = setting(0.2, 'how far below 1 a ratio counts', minimum=0.0, maximum=1.0)
  clip_high: float = setting(0.0, 'how far above 1 a ratio counts; 0: as far as below (DAPO: 0.28; CISPO: the '
                             'largest ratio less 1)', minimum=0.0)
  dual_clip: float = setting(0.0, 'largest ratio also where the advantage is negative (two-sided, '
                              'arXiv:2505.07291); 0: none', minimum=0.0)
  kl_coef: float = setting(0.0, 'weight of the KL from the reference in the loss', minimum=0.0)
  kl_estimator: str = setting('k3', 'of the KL in the loss', choices=('k1', 'k2', 'k3', 'abs'))
  entropy_coef: float = setting(0.0, "weight of the policy's entropy, which the loss takes away", minimum=0.0)
  temperatures: tuple[float, ...] = setting((1.0, 1.05), 'sapo: of advantages above 0, and of the others')
  gammas: tuple[float, ...] = setting((2.0, 3.0, 3.0, 2.0), 'vespo: k and lambda of advantages from 0, and of others')
  gamma: float = setting(1.0, 'gae: what a reward one token later is worth', minimum=0.0, maximum=1.0)
  gae_lambda: float = setting(0.95, 'gae: lambda; 0 trusts the value head, 1 the rewards', minimum=0.0, maximum=1.0)
  value_coef: float = setting(0.1, 'gae: weight of the value loss', minimum=0.0)
  value_clip: float = setting(0.2, 'gae: how far a value is believed to move in an iteration; 0: any way', minimum=0.0)
  whiten_rewards: bool = setting(False, 'gae: bring rewards to variance 1')
  whiten_advantages: bool = setting(True, 'gae: bring advantages to mean 0 and variance 1')

  @classmethod
  def base(cls, values):
    """Returns the fields that the loss named in `values` sets."""
    name = values.get('name', 'grpo')
    return NAMED.get(name, {}) if isinstance(name, str) else {}

  @property
  def high(self):
    return self.clip_high or self.clip_low

  def validate(self):
    if len(self.temperatures) != 2 or min(self.temperatures) <= 0:
      yield f'temperatures={self.temperatures} must be two numbers above 0, such as 1.0,1.05'
    if len(self.gammas) != 4:
      yield f'gammas={self.gammas} must be four numbers, such as 2.0,3.0,3.0,2.0'


REWARDS = ('math', 'exact', 'doctest', 'regex', 'format', 'length', 'model')


@dataclasses.dataclass(frozen=True)
class RlSpec:
  """Rollouts, and what they are worth."""

  prompts_per_iteration: int = setting(16, 'prompts of an iteration', minimum=1)
  num_generations: int = setting(8, 'answers to each prompt', minimum=1)
  epochs: int = setting(1, 'times that an iteration trains on its rows, train.batch_size of them a step', minimum=1)
  max_new_tokens: int = setting(64, 'tokens of an answer, the end included', minimum=1)
  temperature: float = setting(1.0, 'divides the logits, of the sampler and of the loss alike', minimum=0.01)
  top_p: float = setting(1.0, 'sample among the most likely tokens that hold this much probability. Below 1 the '
                         'sampler draws from another distribution than the one that is trained', minimum=0.01,
                         maximum=1.0)
  top_k: int = setting(0, 'sample among this many most likely tokens; 0: all. As for top_p', minimum=0)
  rewards: dict[str, float] = setting(
      {'math': 1.0}, 'what an answer is worth, and with what weight', choices=REWARDS)
  pattern: str = setting('', 'regex: what must be found in the answer; {answer} stands for the right one')
  format: str = setting('', 'format: what the whole answer must match')
  length: int = setting(0, 'length: tokens of the ideal answer; the reward falls to 0 at none and at twice as many',
                        minimum=0)
  reward_model: str = setting('', "model: a reward model's run folder", kind='path')
  step_score: str = setting('min', 'model, where it scores steps: an answer is worth as much as its worst step, or the '
                            'product of what all are', choices=('min', 'product'))
  overlong_tokens: int = setting(0, 'the last tokens before max_new_tokens, over which a reward falls by 1 (DAPO); 0: '
                                 'none', minimum=0)
  missing_eos_penalty: float = setting(0.0, 'taken from the reward of an answer without an end', minimum=0.0)
  mask_truncated: bool = setting(False, 'learn nothing from an answer without an end')
  kl_coef: float = setting(0.0, 'weight of the KL from the reference in the rewards, token by token (PPO)', minimum=0.0)
  kl_estimator: str = setting('k1', 'of the KL in the rewards', choices=('k1', 'k2', 'k3', 'abs'))
  kl_target: float = setting(0.0, 'KL of a sequence, in nats, that kl_coef is adapted to hold; 0: kl_coef is fixed',
                             minimum=0.0)
  kl_horizon: int = setting(10_000, 'sequences in which kl_coef adapts', minimum=1)
  reference: bool = setting(True, 'keep the model that training begins with, to measure the KL from it')
  max_resample_rounds: int = setting(1, 'how many times prompts whose completions all have the same reward are '
                                     'replaced by other prompts (dynamic sampling of DAPO); 1: never', minimum=1)
  # Of a run of 1.3 M parameters, float32: 4e-7 in the mean and 6e-6 at most, and each of the two up to 1.3e-5 from
  # float64.  A wrong temperature, mask or position is thousands of times that.
  logprob_tolerance: float = setting(1e-5, 'largest mean difference between log-probabilities of the sampler and the '
                                     'trainer, relative where they are above 1; single ones may differ by 100 times '
                                     'that. More is an error with compute_dtype=float32', minimum=0.0)

  @property
  def rows(self):
    """Rows of an iteration."""
    return self.prompts_per_iteration * self.num_generations

  def validate(self):
    if not self.rewards:
      yield f'rewards is empty; write some of {", ".join(REWARDS)}, such as rewards.math=1'
    for name, field in (('regex', 'pattern'), ('format', 'format'), ('length', 'length'), ('model', 'reward_model')):
      value = getattr(self, field)
      if name in self.rewards and not value:
        yield f'{field} is missing: rewards has {name}'
      if value and name not in self.rewards:
        yield f'{field} has no part in these rewards; add rewards.{name}=1, or leave it out'
    for field in ('pattern', 'format'):
      try:
        re.compile(getattr(self, field).replace('{answer}', 'x'))
      except re.error as e:
        yield f'{field} is no regular expression: {e}'
    if self.overlong_tokens > self.max_new_tokens:
      yield (f'overlong_tokens={self.overlong_tokens} is more than max_new_tokens={self.max_new_tokens}; write '
             f'{max(self.max_new_tokens // 4, 1)} for a quarter')
    if self.kl_target and not self.kl_coef:
      yield f'kl_target={self.kl_target} needs a kl_coef to begin with, such as kl_coef=0.1'
    if not self.reference and self.kl_coef:
      yield 'reference=False leaves nothing to measure the KL from; write kl_coef=0, or reference=True'


# How layers of a teacher become those of a student; see `DistillSpec.layers`.
LAYER_CHOICES = ('', 'every_2nd', 'first', 'spread')


@dataclasses.dataclass(frozen=True)
class DistillSpec:
  """What a student learns from a teacher's distribution, and how it begins."""

  teacher: str = setting('', "the teacher: a run's folder, or one checkpoint of it; empty: no distillation",
                         kind='path')
  loss: str = setting('forward_kl', 'forward_kl covers all that the teacher does, reverse_kl seeks its modes, jsd lies '
                      'between (GKD, arXiv:2306.13649); hinton adds the data: alpha T^2 forward_kl + (1 - alpha) '
                      'cross-entropy (arXiv:1503.02531)', choices=('forward_kl', 'reverse_kl', 'jsd', 'hinton'))
  beta: float = setting(0.5, 'jsd: 0 is forward_kl, 1 reverse_kl', minimum=0.0, maximum=1.0)
  temperature: float = setting(1.0, 'divides the logits of both; above 1 unlikely words count more', minimum=0.0)
  alpha: float = setting(0.5, "hinton: the teacher's part; the rest is the data's", minimum=0.0, maximum=1.0)
  hidden_weight: float = setting(0.0, 'of the mean squared difference of the final hidden states, as an added term; '
                                 'where widths differ, a projection of the student is trained with it', minimum=0.0)
  cosine_weight: float = setting(0.0, 'of 1 - cos of the final hidden states, as an added term (DistilBERT, '
                                 'arXiv:1910.01108)', minimum=0.0)
  top_k: int = setting(0, "keep the teacher's likeliest words of every token in the run's folder, so many of them, "
                       'instead of the teacher in memory (8 bytes a word and token); 0: the teacher stays', minimum=0)
  on_policy: float = setting(0.0, "lambda: share of the batches whose rows the student itself goes on with, for the "
                             "teacher to judge (GKD, arXiv:2306.13649, alg. 1); 0: all are the data's", minimum=0.0,
                             maximum=1.0)
  max_new_tokens: int = setting(32, 'on_policy: tokens that the student says in a row, its end included', minimum=1)
  init: str = setting('', 'layers of the teacher that the student begins with, its embeddings too: every_2nd from the '
                      'lowest (DistilBERT), the first ones, or some spread from the lowest to the highest',
                      choices=LAYER_CHOICES)

  @property
  def compares_hidden(self):
    return bool(self.hidden_weight or self.cosine_weight)

  def layers(self, student, teacher):
    """Returns the numbers of the teacher's layers that the student's begin as.  student, teacher: how many each has."""
    if self.init == 'every_2nd':
      return list(range(0, teacher, 2))[:student]
    if self.init == 'first' or student == 1:
      return list(range(student))
    return [round(i * (teacher - 1) / (student - 1)) for i in range(student)]

  def validate(self):
    if not self.teacher:
      if changed := [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]:
        yield f'teacher is missing, which {changed[0]} is about; write distill.teacher=runs/big'
      return
    if not self.temperature:
      yield 'temperature=0.0 leaves one word; write temperature=1.0'
    if self.top_k and self.loss in ('reverse_kl', 'jsd'):
      yield (f'loss={self.loss} needs the whole distribution of the teacher; write loss=forward_kl or loss=hinton, or '
             'top_k=0')
    if self.on_policy and self.top_k:
      yield 'top_k keeps what the teacher said of the data, not of what the student will say; write top_k=0'
    if self.on_policy and self.loss == 'hinton':
      yield 'loss=hinton would teach the student its own words as the data; write loss=forward_kl, reverse_kl or jsd'
    if self.top_k and self.compares_hidden:
      yield ('top_k keeps no hidden states, which hidden_weight and cosine_weight compare; write top_k=0')
