"""The preference and distillation groups of a config, and how a policy loss is put together.  No JAX here."""

import dataclasses

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

  def problems(self):
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


@dataclasses.dataclass(frozen=True)
class PolicySpec:
  """The policy loss: which surrogate, of which ratio, averaged how.  `NAMED` has the ones of papers."""

  surrogate: str = setting('clip', 'what a ratio and an advantage give: clip (PPO), cispo, sapo, vespo, or reinforce',
                           choices=('clip', 'cispo', 'sapo', 'vespo', 'reinforce'))
  ratio: str = setting('token', "of a token; of the sequence as its tokens' geometric mean (GSPO); of the whole "
                       'trajectory as their product (RLOO)', choices=('token', 'sequence', 'trajectory'))
  average: str = setting('token', "of all tokens alike (DAPO); of sequences, each its tokens' mean (GRPO); of "
                         "sequences, each its tokens' sum over max_length (constant, Dr. GRPO); of sequences, each its "
                         "tokens' sum (sum)", choices=('token', 'sequence', 'constant', 'sum'))
  clip_low: float = setting(0.2, 'how far below 1 a ratio counts', minimum=0.0, maximum=1.0)
  clip_high: float = setting(0.0, 'how far above 1 a ratio counts; 0: as far as below (DAPO: 0.28; CISPO: the '
                             'largest ratio less 1)', minimum=0.0)
  clip_ratio: float = setting(0.0, 'largest ratio also where the advantage is negative (two-sided, '
                              'arXiv:2505.07291); 0: none', minimum=0.0)
  kl_coef: float = setting(0.0, 'weight of the KL from the reference in the loss', minimum=0.0)
  kl_estimator: str = setting('k3', 'of the KL in the loss', choices=('k1', 'k2', 'k3', 'abs'))
  entropy_coef: float = setting(0.0, "weight of the policy's entropy, which the loss takes away", minimum=0.0)
  temperatures: tuple[float, ...] = setting((1.0, 1.05), 'sapo: of advantages above 0, and of the others')
  gammas: tuple[float, ...] = setting((2.0, 3.0, 3.0, 2.0), 'vespo: k and lambda of advantages from 0, and of others')

  @property
  def high(self):
    return self.clip_high or self.clip_low

  def problems(self):
    if len(self.temperatures) != 2 or min(self.temperatures) <= 0:
      yield f'temperatures={self.temperatures} must be two numbers above 0, such as 1.0,1.05'
    if len(self.gammas) != 4:
      yield f'gammas={self.gammas} must be four numbers, such as 2.0,3.0,3.0,2.0'


# What papers call them; a config's own fields come on top.
NAMED = {
    'ppo': {'surrogate': 'clip', 'ratio': 'token', 'average': 'token'},  # arXiv:1707.06347
    'grpo': {'surrogate': 'clip', 'ratio': 'token', 'average': 'sequence'},  # arXiv:2402.03300, eq. 3
    'bnpo': {'surrogate': 'clip', 'ratio': 'token', 'average': 'token'},  # GRPO over all tokens
    'dapo': {'surrogate': 'clip', 'ratio': 'token', 'average': 'token', 'clip_high': 0.28},  # arXiv:2503.14476
    'dr_grpo': {'surrogate': 'clip', 'ratio': 'token', 'average': 'constant'},  # arXiv:2503.20783
    'gspo': {'surrogate': 'clip', 'ratio': 'sequence', 'average': 'sequence', 'clip_low': 3e-4,
             'clip_high': 4e-4},  # arXiv:2507.18071, section 5.1
    'rloo': {'surrogate': 'clip', 'ratio': 'trajectory', 'average': 'sequence'},  # arXiv:2402.14740
    'cispo': {'surrogate': 'cispo', 'ratio': 'token', 'average': 'token', 'clip_high': 4.0},  # arXiv:2506.13585
    'sapo': {'surrogate': 'sapo', 'ratio': 'token', 'average': 'sequence'},  # arXiv:2511.20347
    'vespo': {'surrogate': 'vespo', 'ratio': 'token', 'average': 'token'},  # arXiv:2602.10693
}
