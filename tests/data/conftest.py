"""Small prepared folders, made once for all tests of the data path."""

import random

import pytest

from llmjax.data import corpus
from llmjax.data.spec import PrepareSpec, TokenizerSpec

WORDS = ('the model reads a row of tokens and learns what comes next from every document in turn '
         'while loss falls slowly because gradients of weights follow data paths').split()


def write_texts(folder, count, seed, words=120):
  """Writes `count` different text files of varied length."""
  rng = random.Random(seed)
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(count):
    text = ' '.join(rng.choices(WORDS, k=rng.randint(3, words)))
    (folder / f'{i:03d}.txt').write_text(f'{text} {seed} {i}.\n\nEnd of {i}.\n')
  return folder


@pytest.fixture(scope='session')
def small_folder(tmp_path_factory):
  """A prepared folder of 60 short documents."""
  root = tmp_path_factory.mktemp('small')
  texts = write_texts(root / 'texts', 60, seed=1)
  spec = PrepareSpec(source='text_dir', path=str(texts), output=str(root / 'small'),
                     validation_fraction=0.1, test_fraction=0.1,
                     tokenizer=TokenizerSpec(vocab_size=400, sample_lines=500))
  corpus.prepare(spec)
  return str(root / 'small')


@pytest.fixture(scope='session')
def other_folder(tmp_path_factory, small_folder):
  """Another prepared folder with the same tokenizer."""
  root = tmp_path_factory.mktemp('other')
  texts = write_texts(root / 'texts', 30, seed=2, words=300)
  spec = PrepareSpec(source='text_dir', path=str(texts), output=str(root / 'other'),
                     tokenizer=TokenizerSpec(path=f'{small_folder}/tokenizer.model'))
  corpus.prepare(spec)
  return str(root / 'other')
