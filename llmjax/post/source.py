"""The batches of reinforcement learning: rollouts, cut into the minibatches of one iteration after the other.

An iteration is `rl.epochs` passes over `rl.prompts_per_iteration` x `rl.num_generations` rows.  Each is written to
`<workdir>/rollouts/<iteration>.jsonl`, a line that describes it and then one for each row, before it is trained on:
for people to read, and so that a run which stops in the middle of an iteration goes on with the same rows, to the
bit (a float32 is the same after JSON).
"""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.config import ConfigError
from llmjax.generate.decode import Generator
from llmjax.parallel import distributed
from llmjax.post import kl as divergence
from llmjax.post import rollout

# Arrays of a row that the file has, of its answer's tokens.
KEPT = ('old_logprobs', 'ref_logprobs', 'old_values', 'advantages', 'returns')


class RolloutSource:
  """An iterator of this process's minibatches, dicts of [rows, T] arrays.

  Before a batch is drawn where `is_due`, `refill` must be called with the parameters to sample from.  `state` is the
  number of minibatches drawn.
  """

  def __init__(self, spec, mesh, prompts, tokenizer, workdir, *, stop_ids, scorer, reference=None, score=None):
    """spec: the command's, with groups rl, policy, model, train, data.  prompts: a stream of batches of prompts.

    scorer: rollout.Scorer.  reference: parameters or None.  score: function of Answers, for the reward `model`.
    """
    self.spec, self.mesh, self.prompts, self.tokenizer = spec, mesh, prompts, tokenizer
    self.folder, self.stop_ids = pathlib.Path(workdir) / 'rollouts', tuple(stop_ids)
    self.scorer, self.reference, self.score = scorer, reference, score
    self.fingerprint = prompts.fingerprint
    self.steps = spec.rl.epochs * spec.rl.rows // spec.train.batch_size  # Of an iteration.
    self._state, self._now, self._number = 0, None, None  # Drawn; the iteration in memory, and which one that is.

  @property
  def state(self):
    return self._state

  @property
  def is_due(self):
    """Whether the next batch is of an iteration that is not there yet."""
    return self._state // self.steps != self._number

  def restore(self, state):
    """Goes to where a source with this state was; in the middle of an iteration with the rows of its file."""
    self._state, self._now, self._number = int(state), None, None
    number, step = divmod(self._state, self.steps)
    if step:
      _, self._now = self._read(number)
      self._number = number

  def close(self):
    self.prompts.close()

  def __iter__(self):
    return self

  def __next__(self):
    if self.is_due:
      raise RuntimeError('there is no rollout for this batch: call refill first')
    number, step = divmod(self._state, self.steps)
    self._state += 1
    rows = rollout.own_rows(self.mesh, self._rows(number, step))
    return {name: a[rows] for name, a in self._now.batch.items()}

  def _rows(self, number, step):
    """Returns which rows of the iteration its minibatch `step` has: every epoch has another order."""
    size = self.spec.train.batch_size
    epoch, part = divmod(step, self.spec.rl.rows // size)
    order = np.random.default_rng([self.spec.train.seed, number, epoch]).permutation(self.spec.rl.rows)
    return order[part * size:(part + 1) * size]

  def describe(self, number):
    """Returns the rows of minibatch `number`, as text; [] where its iteration is gone."""
    iteration, step = divmod(number, self.steps)
    if iteration != self._number:
      return []
    keys = ('prompt', 'text', 'answer', 'reward')
    return [{k: self._now.records[i][k] for k in keys} for i in self._rows(iteration, step)]

  def refill(self, params):
    """Samples the next iteration from the parameters; returns its metrics.  

    Raises ConfigError: see `rl.logprob_tolerance`.
    """
    number = self._state // self.steps
    cursor, coefficient = 0, self.spec.rl.kl_coef
    if number:
      header, _ = self._read(number - 1, rows=False)
      cursor, coefficient = header['cursor'], header['next_kl_coef']
    self.prompts.restore(cursor)
    found = self._draw(params, number)
    self._now, following = self._finish(params, found, coefficient)
    self._number = number
    header = {'iteration': number, 'cursor': self.prompts.state, 'kl_coef': coefficient, 'next_kl_coef': following,
              'metrics': self._now.metrics}
    if distributed.is_first():
      self._write(number, header)
    distributed.wait_for_all('wrote the rollouts')
    return self._now.metrics

  def _draw(self, params, number):
    """Returns (prompts with their answers, sampler's log-probabilities, rewards): groups of rows in order."""
    spec, rl = self.spec, self.spec.rl
    generator = Generator(spec.model, params, jnp.dtype(spec.train.compute_dtype), self.mesh,
                          vocab_size=self.tokenizer.vocab_size)
    key = jax.random.fold_in(jax.random.key(spec.train.seed), number)
    kept, spare, rounds, rewards = [], [], 0, []
    while len(kept) < rl.prompts_per_iteration and rounds < rl.max_resample_rounds:
      prompts = next(self.prompts)
      ids = [np.asarray(p['ids'], np.int32) for p in prompts]
      answers, logprobs = rollout.sample(generator, ids, rl.num_generations, rl, jax.random.fold_in(key, rounds),
                                         self.stop_ids)
      judged = self._judge(prompts, answers)
      rounds, rewards = rounds + 1, rewards + judged[1]
      for i in range(len(prompts)):
        rows = slice(i * rl.num_generations, (i + 1) * rl.num_generations)
        group = (ids[i], answers[rows], logprobs[rows], *(part[rows] for part in judged))
        # What the answers themselves are worth decides, not how long they are.
        same = rl.num_generations > 1 and np.ptp([row['raw'] for row in judged[0][rows]]) == 0
        (spare if same and rl.max_resample_rounds > 1 else kept).append(group)
    # The rewards of those that are kept would be no fair sample.
    self._drawn = {'reward': float(np.mean(rewards)), 'rounds': rounds,
                   'equal_groups': len(spare) * rl.num_generations / len(rewards)}
    return (kept + spare)[:rl.prompts_per_iteration]

  def _judge(self, prompts, answers):
    """Returns ([what is written of each row], [its reward])."""
    made = [rollout.answer_of(self.tokenizer, prompts[i // self.spec.rl.num_generations], answer, self.stop_ids)
            for i, answer in enumerate(answers)]
    parts, raw, total = rollout.judge(self.spec.rl, made, self.score)
    rows = [{'prompt': a.prompt, 'text': a.text, 'answer': a.reference, 'reward': float(total[i]),
             'rewards': {name: values[i] for name, values in parts.items()}, 'raw': float(raw[i]),
             'ended': a.ended, 'tokens': a.tokens} for i, a in enumerate(made)]
    return rows, list(total)

  def _finish(self, params, groups, coefficient):
    """Returns (Iteration, the next KL coefficient) of the groups that `_draw` returns."""
    spec, rl, length = self.spec, self.spec.rl, self.spec.data.seq_len
    prompts = [g[0] for g in groups for _ in range(rl.num_generations)]
    answers, logprobs, records, totals = ([x for g in groups for x in g[i]] for i in range(1, 5))
    batch = rollout.make_rows(prompts, answers, length)
    gae = spec.policy.advantages == 'gae'
    scores = self.scorer(params, batch, gae)
    mask = batch['loss_mask'].copy()
    batch['old_logprobs'] = scores['logprobs'] * mask
    if gae:
      batch['old_values'] = scores['values'] * mask
    if self.reference is not None:
      batch['ref_logprobs'] = self.scorer(self.reference, batch)['logprobs'] * mask
    sampled = rollout.spread(logprobs, prompts, length)
    metrics = {**self._check(sampled, batch['old_logprobs'], mask), **_summary(records, scores, mask)}
    kl = rollout.weigh(rl, spec.policy, batch, totals, coefficient)
    following = coefficient
    if kl is not None:
      metrics['kl'] = float(kl.mean())
      if rl.kl_target:
        following = divergence.adapt(coefficient, metrics['kl'], rl.kl_target, rl.kl_horizon, len(kl))
    if rl.kl_coef:
      metrics['kl_coef'] = coefficient
    if rl.max_resample_rounds > 1:
      metrics |= {'kept_reward': metrics['reward'], **self._drawn}
    if rl.mask_truncated:
      batch['loss_mask'] = mask * np.array([[r['ended']] for r in records], np.float32)
    for i, (record, prompt, answer) in enumerate(zip(records, prompts, answers, strict=True)):
      record['prompt_ids'], record['ids'] = prompt.tolist(), answer.tolist()
      record['trained'] = bool(batch['loss_mask'][i].any())
      for name in KEPT:
        if name in batch:
          record[name] = batch[name][i][mask[i] != 0].tolist()
    return rollout.Iteration(batch, records, metrics, coefficient), following

  def _check(self, sampled, trained, mask):
    """Returns how far sampler and trainer are apart; ConfigError where they must agree and do not."""
    rl = self.spec.rl
    if rl.top_p < 1 or rl.top_k:
      # The sampler drew from what these left, the trainer counts all: the gap is what they took away.
      gaps = ((sampled - trained) * mask).sum() / mask.sum()
      return {'truncated_logprob': float(gaps)}
    gap, largest = rollout.disagreement(sampled, trained, mask)
    if max(gap, largest / 100) > rl.logprob_tolerance and self.spec.train.compute_dtype == 'float32':
      raise ConfigError([f'the log-probabilities of sampler and trainer differ by {gap:.2g} in the mean and '
                         f'{largest:.2g} at most, more than rl.logprob_tolerance={rl.logprob_tolerance:g} or 100 times '
                         'that: what is '
                         'learnt would not be of what was drawn'])
    return {'logprob_gap': gap, 'largest_logprob_gap': largest}

  def _path(self, number):
    return self.folder / f'{number:06d}.jsonl'

  def _write(self, number, header):
    path = self._path(number)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix('.partial')
    with open(temporary, 'w', encoding='utf-8') as f:
      for row in (header, *self._now.records):
        f.write(json.dumps(row, ensure_ascii=False) + '\n')
      f.flush()
      os.fsync(f.fileno())  # A checkpoint will point to it.
    temporary.replace(path)

  def _read(self, number, rows=True):
    """Returns (header, Iteration or None) of a file; ConfigError when it is not what was written."""
    path = self._path(number)
    try:
      with open(path, encoding='utf-8') as f:
        header = json.loads(f.readline())
        if not rows:
          return header, None
        records = [json.loads(line) for line in f]
      if len(records) != self.spec.rl.rows or header['iteration'] != number:
        raise ValueError(f'{len(records)} rows')
      prompts = [np.asarray(r['prompt_ids'], np.int32) for r in records]
      answers = [np.asarray(r['ids'], np.int32) for r in records]
      length = self.spec.data.seq_len
      batch = rollout.make_rows(prompts, answers, length)
      batch |= {name: rollout.spread([r[name] for r in records], prompts, length)
                for name in KEPT if name in records[0]}
      batch['loss_mask'] *= np.array([[r['trained']] for r in records], np.float32)
      return header, rollout.Iteration(batch, records, header['metrics'], header['kl_coef'])
    except (OSError, ValueError, KeyError, TypeError) as e:
      raise ConfigError([f'{path}, the rollouts that the checkpoint goes on with, cannot be used ({e}); put the file '
                         'back, or start a new run: --workdir=NEW --config.train.init_from='
                         f'{self.folder.parent}']) from e


def _summary(records, scores, mask):
  """Returns the metrics of an iteration's rows: means over rows, of entropy over tokens."""
  mean = lambda name: float(np.mean([r[name] for r in records]))
  parts = {f'reward/{name}': float(np.mean([r['rewards'][name] for r in records])) for name in records[0]['rewards']}
  return {'reward': mean('reward'), **parts, 'tokens': mean('tokens'), 'ended': mean('ended'),
          'entropy': float((scores['entropies'] * mask).sum() / mask.sum())}
