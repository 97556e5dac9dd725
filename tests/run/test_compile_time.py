"""Compilation time is separated from all other times."""

import time

import jax
import jax.numpy as jnp
import pytest

from llmjax.generate.output import describe_speed
from llmjax.run import compile_time
from llmjax.run.goodput import Goodput


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_nested_compile_events_count_once():
  clock = Clock()
  compiled = compile_time.CompileClock(clock)
  for now, event, seconds in ((1.0, 'jaxpr_trace_duration', 0.5), (2.0, 'jaxpr_trace_duration', 0.5),
                              (3.0, 'jaxpr_trace_duration', 2.75), (5.0, 'backend_compile_duration', 2.0)):
    clock.now = now
    compiled(compile_time.STAGES + event, seconds)
  compiled('/jax/other', 99.0)
  assert compiled.seconds == 2.75 + 2.0


def test_compilation_is_excluded_from_a_stopwatch_and_charged_to_its_own_bucket(tmp_path):
  goodput = Goodput(tmp_path)
  with compile_time.charged(goodput, 'rollout') as first:
    # A size of its own, so that nothing has compiled it before.
    jax.jit(lambda x: jnp.sin(x @ x) + 1)(jnp.ones((37, 37))).block_until_ready()
    time.sleep(0.05)
  assert first.compiling > 0.005 and 0.05 <= first.seconds < first.seconds + first.compiling
  assert goodput.seconds['compile'] == pytest.approx(first.compiling)
  assert goodput.seconds['rollout'] >= 0.05
  total = goodput.seconds['compile'] + goodput.seconds['rollout']
  assert total == pytest.approx(first.seconds + first.compiling, abs=0.02)
  with compile_time.charged(goodput, 'rollout') as second:
    time.sleep(0.01)
  assert second.compiling == 0


def test_generation_speed_excludes_compilation_and_the_first_token():
  # One token after 0.05 s, then 100 in 0.2 s: a compilation of 20 s is no part of either.
  assert describe_speed([0.05, 0.15, 0.25], [1, 50, 50], 20.06) == (
      '0.05 s to the first token, then 500 tokens/s; compiled in 20.1 s')
  assert describe_speed([0.05], [3], 0.0) == '0.05 s to the first token'
