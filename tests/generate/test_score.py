"""Log-probabilities of completions against those of sampling and of the full forward pass."""

import jax
import numpy as np
import pytest

from llmjax.generate.score import score
from llmjax.generate.spec import SamplingSpec
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.spec import MeshSpec
from tests.generate.test_decode import BOS, VOCAB, full_logits, make_generator, make_params

LENGTHS = (5, 37, 1, 20, 2)


def draw(lengths, seed):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, VOCAB, length) for length in lengths]


@pytest.mark.parametrize('name', ['plain', 'varied'])
def test_scores_are_those_of_the_full_forward(name):
  generator, prompts, continuations = make_generator(name), draw(LENGTHS, 0), draw((3, 9, 1, 40, 2), 1)
  found = score(generator, prompts, continuations)
  for prompt, continuation, values in zip(prompts, continuations, found, strict=True):
    row = np.zeros(64, int)  # Causal: what stands after the row changes nothing.
    row[:len(prompt) + len(continuation)] = np.concatenate([prompt, continuation])
    logits = full_logits(generator.spec, make_params(generator.spec), row[None])[0]
    logprobs = jax.nn.log_softmax(logits[len(prompt) - 1:len(prompt) + len(continuation) - 1])
    np.testing.assert_allclose(values, logprobs[np.arange(len(continuation)), continuation], atol=1e-5)


@pytest.mark.slow
def test_samples_get_their_sampling_logprobs_whatever_the_batch():
  prompts = draw(LENGTHS, 2)
  mesh = make_mesh(MeshSpec(data=4, tensor=2))
  for options in ({'vocab_size': VOCAB - 20}, {'mesh': mesh}):
    generator = make_generator(**options)
    prompts = [p % generator.vocab_size for p in prompts]
    made = generator.generate(prompts, 10, SamplingSpec(), jax.random.key(0), stop_ids=(BOS,))
    continuations = [tokens[:n] for tokens, n in zip(made.tokens, made.lengths, strict=True)]
    together = score(generator, prompts, continuations)
    for i, values in enumerate(together):
      np.testing.assert_allclose(values, made.logprobs[i, :made.lengths[i]], atol=1e-5)
      alone, = score(generator, prompts[i:i + 1], continuations[i:i + 1])
      np.testing.assert_allclose(values, alone, atol=1e-5)


def test_empty_sequences_are_refused():
  assert score(make_generator(), [], []) == []
  with pytest.raises(ValueError, match='empty'):
    score(make_generator(), [np.array([3])], [np.array([], int)])
