"""The batches of reinforcement learning: each iteration's rollouts, split into minibatches.

An iteration is `rl.epochs` passes over `rl.prompts_per_iteration` x `rl.num_generations` sequences.  Before it is
trained on, it is written to `<workdir>/rollouts/<iteration>.jsonl`, a header and then one line per sequence, to be read
by people and so that a run stopped in the middle of an iteration resumes with the same batch to the bit (JSON keeps
float32 exactly).
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
from llmjax.post import kl, rollout
from llmjax.post.rewards import compute_rewards

# Per-token arrays of a completion that are stored in the file.
STORED = ('old_logprobs', 'ref_logprobs', 'old_values', 'advantages', 'returns')


class RolloutStream:
  """An iterator over this process's minibatches, dicts of [rows, T] arrays.

  Where `is_due`, call `refill` with the parameters to sample from before the next batch.  `state` is the number of
  minibatches drawn.
  """

  def __init__(self, spec, mesh, prompts, tokenizer, workdir, *, stop_ids, scorer, reference=None, score=None):
    """spec: with groups rl, policy, model, train, data.  prompts: a stream of batches of prompts.

    scorer: rollout.TokenScorer.  reference: parameters of the reference model, or None.  score: function of Completions
    to the scores of the reward model, for the reward `model`.
    """
    self.spec, self.mesh, self.prompts, self.tokenizer = spec, mesh, prompts, tokenizer
    self.folder, self.stop_ids = pathlib.Path(workdir) / 'rollouts', tuple(stop_ids)
    self.scorer, self.reference, self.score = scorer, reference, score
    self.fingerprint = prompts.fingerprint
    self.steps = spec.rl.epochs * spec.rl.rows // spec.train.batch_size  # Of an iteration.
    self._state, self._iteration, self._number = 0, None, None  # Minibatches drawn; the current Iteration, its index.

  @property
  def state(self):
    return self._state

  @property
  def is_due(self):
    """Whether the next batch needs new rollouts."""
    return self._state // self.steps != self._number

  def restore(self, state):
    """Continue from a state; in the middle of an iteration its file is read."""
    self._state, self._iteration, self._number = int(state), None, None
    number, step = divmod(self._state, self.steps)
    if step:
      _, self._iteration = self._read(number)
      self._number = number

  def close(self):
    self.prompts.close()

  def __iter__(self):
    return self

  def __next__(self):
    if self.is_due:
      raise RuntimeError('this batch has no rollouts: call refill first')
    number, step = divmod(self._state, self.steps)
    self._state += 1
    rows = rollout.local_rows(self.mesh, self._rows(number, step))
    return {name: a[rows] for name, a in self._iteration.batch.items()}

  def _rows(self, number, step):
    """Return the rows of minibatch `step` of an iteration; every epoch has its own order."""
    size = self.spec.train.batch_size
    epoch, minibatch = divmod(step, self.spec.rl.rows // size)
    order = np.random.default_rng([self.spec.train.seed, number, epoch]).permutation(self.spec.rl.rows)
    return order[minibatch * size:(minibatch + 1) * size]

  def describe(self, number):
    """Return the sequences of minibatch `number` as text; [] where its iteration is not in memory."""
    iteration, step = divmod(number, self.steps)
    if iteration != self._number:
      return []
    keys = ('prompt', 'text', 'answer', 'reward')
    return [{k: self._iteration.records[i][k] for k in keys} for i in self._rows(iteration, step)]

  def refill(self, params):
    """Sample the next iteration; returns its metrics.  Raises ConfigError beyond `rl.logprob_tolerance`."""
    number = self._state // self.steps
    cursor, kl_coef = 0, self.spec.rl.kl_coef
    if number:
      header, _ = self._read(number - 1, rows=False)
      cursor, kl_coef = header['cursor'], header['next_kl_coef']
    self.prompts.restore(cursor)
    groups, sampling_metrics = self._sample_groups(params, number)
    self._iteration, next_kl_coef = self._make_iteration(params, groups, sampling_metrics, kl_coef)
    self._number = number
    header = {'iteration': number, 'cursor': self.prompts.state, 'kl_coef': kl_coef, 'next_kl_coef': next_kl_coef,
              'metrics': self._iteration.metrics}
    if distributed.is_first():
      self._write(number, header)
    distributed.wait_for_all('wrote the rollouts')
    return self._iteration.metrics

  def _sample_groups(self, params, number):
    """Sample completions of rl.prompts_per_iteration prompts; returns (groups, metrics).

    A group is (prompt, completions, log-probabilities of the sampler, records).  With rl.max_resample_rounds groups of
    equal rewards are replaced as long as rounds are left (dynamic sampling).
    """
    spec, rl = self.spec, self.spec.rl
    generator = Generator(spec.model, params, jnp.dtype(spec.train.compute_dtype), self.mesh,
                          vocab_size=self.tokenizer.vocab_size)
    key = jax.random.fold_in(jax.random.key(spec.train.seed), number)
    kept, equal, rounds, rewards = [], [], 0, []
    while len(kept) < rl.prompts_per_iteration and rounds < rl.max_resample_rounds:
      prompts = next(self.prompts)
      ids = [np.asarray(p['ids'], np.int32) for p in prompts]
      completions, logprobs = rollout.sample(generator, ids, rl.num_generations, rl, jax.random.fold_in(key, rounds),
                                             self.stop_ids)
      records = self._score(prompts, completions)
      rounds, rewards = rounds + 1, rewards + [record['reward'] for record in records]
      for i in range(len(prompts)):
        rows = slice(i * rl.num_generations, (i + 1) * rl.num_generations)
        # By the rewards without the overlong penalty: lengths do not make a group informative.
        is_equal = rl.num_generations > 1 and np.ptp([record['raw'] for record in records[rows]]) == 0
        group = ids[i], completions[rows], logprobs[rows], records[rows]
        (equal if is_equal and rl.max_resample_rounds > 1 else kept).append(group)
    # Rewards of all samples: those of the kept groups alone would be biased.
    metrics = {'reward': float(np.mean(rewards)), 'rounds': rounds,
               'equal_groups': len(equal) * rl.num_generations / len(rewards)}
    return (kept + equal)[:rl.prompts_per_iteration], metrics

  def _score(self, prompts, completions):
    """Return the records of completions with their rewards."""
    decoded = [rollout.decode_completion(self.tokenizer, prompts[i // self.spec.rl.num_generations], tokens,
                                         self.stop_ids) for i, tokens in enumerate(completions)]
    rewards = compute_rewards(self.spec.rl, decoded, self.score)
    return [{'prompt': c.prompt, 'text': c.text, 'answer': c.answer, 'reward': float(rewards.total[i]),
             'rewards': {name: values[i] for name, values in rewards.by_name.items()}, 'raw': float(rewards.raw[i]),
             'ended': c.ended, 'tokens': c.num_tokens} for i, c in enumerate(decoded)]

  def _make_iteration(self, params, groups, sampling_metrics, kl_coef):
    """Return (Iteration, the next KL coefficient)."""
    rl, length = self.spec.rl, self.spec.data.seq_len
    prompts = [group[0] for group in groups for _ in range(rl.num_generations)]
    completions, sampled, records = ([x for group in groups for x in group[i]] for i in range(1, 4))
    batch = rollout.make_batch(prompts, completions, length)
    mask = batch['loss_mask'].copy()
    scores = self._score_tokens(params, batch)
    sampled = rollout.align_to_targets(sampled, prompts, length)
    metrics = {**self._compare_logprobs(sampled, batch['old_logprobs'], mask),
               **_mean_metrics(records, scores['entropies'], mask)}
    rewards = [record['reward'] for record in records]
    divergence = rollout.add_advantages(rl, self.spec.policy, batch, rewards, kl_coef)
    next_kl_coef = kl_coef
    if divergence is not None:
      metrics['kl'] = float(divergence.mean())
      if rl.kl_target:
        next_kl_coef = kl.adapt(kl_coef, metrics['kl'], rl.kl_target, rl.kl_horizon, len(divergence))
    if rl.kl_coef:
      metrics['kl_coef'] = kl_coef
    if rl.max_resample_rounds > 1:
      metrics |= {'kept_reward': metrics['reward'], **sampling_metrics}
    if rl.mask_truncated_completions:
      batch['loss_mask'] = mask * np.array([[record['ended']] for record in records], np.float32)
    for i, (record, prompt, completion) in enumerate(zip(records, prompts, completions, strict=True)):
      record['prompt_ids'], record['ids'] = prompt.tolist(), completion.tolist()
      record['trained'] = bool(batch['loss_mask'][i].any())
      record |= {name: batch[name][i][mask[i] != 0].tolist() for name in STORED if name in batch}
    return rollout.Iteration(batch, records, metrics, kl_coef), next_kl_coef

  def _score_tokens(self, params, batch):
    """Add `old_logprobs`, `ref_logprobs` and `old_values` to the batch; returns the TokenScorer's arrays."""
    with_values = self.spec.policy.advantage_estimator == 'gae'
    mask = batch['loss_mask']
    scores = self.scorer(params, batch, with_values)
    batch['old_logprobs'] = scores['logprobs'] * mask
    if with_values:
      batch['old_values'] = scores['values'] * mask
    if self.reference is not None:
      batch['ref_logprobs'] = self.scorer(self.reference, batch)['logprobs'] * mask
    return scores

  def _compare_logprobs(self, sampled, trained, mask):
    """Return the gap between sampler and trainer; raises ConfigError where it exceeds the tolerance in float32."""
    rl = self.spec.rl
    if rl.top_p < 1 or rl.top_k:
      # The sampler's distribution is renormalized over fewer tokens: the gap is the log of their probability.
      return {'truncated_logprob': float(((sampled - trained) * mask).sum() / mask.sum())}
    mean, largest = rollout.logprob_gap(sampled, trained, mask)
    if max(mean, largest / 100) > rl.logprob_tolerance and self.spec.train.compute_dtype == 'float32':
      raise ConfigError([f'log-probabilities of the sampler and the trainer differ by {mean:.2g} on average and '
                         f'{largest:.2g} at most, more than rl.logprob_tolerance={rl.logprob_tolerance:g} or 100 times '
                         'that: training would be off-policy; report this, or raise rl.logprob_tolerance'])
    return {'logprob_gap': mean, 'largest_logprob_gap': largest}

  def _path(self, number):
    return self.folder / f'{number:06d}.jsonl'

  def _write(self, number, header):
    path = self._path(number)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix('.partial')
    with open(temporary, 'w', encoding='utf-8') as f:
      for row in (header, *self._iteration.records):
        f.write(json.dumps(row, ensure_ascii=False) + '\n')
      f.flush()
      os.fsync(f.fileno())  # A checkpoint will depend on it.
    temporary.replace(path)

  def _read(self, number, rows=True):
    """Return (header, Iteration or None) of a file; raises ConfigError where it is missing or damaged."""
    path = self._path(number)
    try:
      with open(path, encoding='utf-8') as f:
        header = json.loads(f.readline())
        if not rows:
          return header, None
        records = [json.loads(line) for line in f]
      if len(records) != self.spec.rl.rows or header['iteration'] != number:
        raise ValueError(f'{len(records)} rows')
      prompts, completions = ([np.asarray(record[name], np.int32) for record in records]
                              for name in ('prompt_ids', 'ids'))
      length = self.spec.data.seq_len
      batch = rollout.make_batch(prompts, completions, length)
      batch |= {name: rollout.align_to_targets([record[name] for record in records], prompts, length)
                for name in STORED if name in records[0]}
      batch['loss_mask'] *= np.array([[record['trained']] for record in records], np.float32)
      return header, rollout.Iteration(batch, records, header['metrics'], header['kl_coef'])
    except (OSError, ValueError, KeyError, TypeError) as e:
      raise ConfigError([f'{path}, the rollouts that the checkpoint resumes with, cannot be used ({e}); put the file '
                         'back, or start a new run: --workdir=NEW --config.train.init_from='
                         f'{self.folder.parent}']) from e


def _mean_metrics(records, entropies, mask):
  """Return the metrics of an iteration: means over sequences, and over tokens for the entropy."""
  mean = lambda values: float(np.mean(list(values)))
  by_name = {f'reward/{name}': mean(record['rewards'][name] for record in records) for name in records[0]['rewards']}
  return {'reward': mean(record['reward'] for record in records), **by_name,
          'tokens': mean(record['tokens'] for record in records),
          'ended': mean(record['ended'] for record in records),
          'entropy': float((entropies * mask).sum() / mask.sum())}
