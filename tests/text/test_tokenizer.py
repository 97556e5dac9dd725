import argparse
import inspect
import pickle
import textwrap

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from llmjax.text import tokenizer as tokenizers

LINES = [line for module in (argparse, textwrap, inspect)
         for line in inspect.getsource(module).splitlines() if line.strip()]
NASTY = [
    '', ' ', '   ', '\n', '\n\n\n', '\t', 'a\tb', 'a\r\nb\r', '\x00', 'a\x00b', '\u00a0',
    'e\u0301 é', '\u2581', 'a\u2581b \u2581\u2581', '\ufeff', '\u2028\u2029\u0085',
    '日本語 한국어 العربية', '👩\u200d👩\u200d👧 🇩🇪', '  lead and trail  ', 'ﬁ ① Ａ',
    '<s></s><pad><unk>', '<|user|>hi<|end|>', '<0x41>', '\U0010ffff', 'x' * 10_000,
    'def f(x):\n    return x\n\n\nclass A:\n\tpass\n']
CHARACTERS = st.one_of(st.characters(exclude_categories=('Cs',)),
                       st.sampled_from(' \n\t\u2581<|>s/'))


@pytest.fixture(scope='module')
def model():
  return tokenizers.train_tokenizer(LINES[:2000], vocab_size=700)


@pytest.fixture(scope='module')
def tokenizer(model, tmp_path_factory):
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model'
  path.write_bytes(model)
  return tokenizers.Tokenizer(path)


@pytest.mark.parametrize('text', NASTY)
def test_round_trip_of_nasty_texts(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert tokenizer.decode(ids) == text


@hypothesis.given(st.text(CHARACTERS))
@hypothesis.settings(deadline=None, max_examples=300)
def test_round_trip_bytes_and_stream(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
  decoder = tokenizer.stream_decoder()
  parts = [decoder.add(i) for i in ids]
  assert decoder.finish() == '' and ''.join(parts) == text
  assert not set(ids.tolist()) & set(tokenizer.special_ids.values())


@hypothesis.given(st.lists(st.sampled_from(
    [*tokenizers.CHAT_MARKERS, '<s>', '</s>', '<pad>', '<unk>', ' ', '\n', 'a', '<|', '|>'])
    ).map(''.join))
@hypothesis.settings(deadline=None, max_examples=100)
def test_text_never_encodes_to_control_symbols(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert not set(ids.tolist()) & {*tokenizer.special_ids.values(), tokenizer.unk_id}


def test_special_ids(tokenizer):
  assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.bos_id) == (0, 1, 2, 3)
  assert set(tokenizers.CHAT_MARKERS) <= set(tokenizer.special_ids)
  sizes = tokenizer.token_bytes()
  assert sizes.shape == (tokenizer.vocab_size,) and sizes.dtype == np.int32
  assert all(sizes[i] == 0 for i in [*tokenizer.special_ids.values(), tokenizer.unk_id])
  assert tokenizer.decode([3, *tokenizer.encode('hi'), 1, 0, 0]) == 'hi'


def test_decodes_as_sentencepiece_does(tokenizer):
  text = '\n'.join(LINES[:200])
  ids = tokenizer.encode(text)
  assert tokenizer._processor.decode(ids.tolist()) == tokenizer.decode(ids) == text


def test_stream_decoder_holds_back_half_characters(tokenizer):
  ids = tokenizer.encode('é👩')
  decoder = tokenizer.stream_decoder()
  parts = [decoder.add(i) for i in ids]
  assert [p for p in parts if p] == ['é', '👩'] and '\ufffd' not in ''.join(parts)
  decoder = tokenizer.stream_decoder()
  assert decoder.add(*tokenizer.encode('👩')[:2]) == '' and decoder.finish() == '\ufffd'


def test_ids_outside_the_vocabulary_are_errors(tokenizer):
  for bad in (-1, tokenizer.vocab_size):
    with pytest.raises(IndexError):
      tokenizer.decode([bad])


def test_lone_surrogate_is_an_error(tokenizer):
  with pytest.raises(UnicodeEncodeError):
    tokenizer.encode('a\ud800')


def test_is_lazy_and_pickles_small(tokenizer, tmp_path):
  tokenizers.Tokenizer(tmp_path / 'absent.model')  # No error before use.
  tokenizer.encode('x')
  data = pickle.dumps(tokenizer)
  assert len(data) < 1000
  copy = pickle.loads(data)
  assert copy.sha256 == tokenizer.sha256
  np.testing.assert_array_equal(copy.encode(LINES[0]), tokenizer.encode(LINES[0]))


@pytest.mark.parametrize('model_type', ['unigram', 'bpe'])
def test_training_is_reproducible(model_type):
  train = lambda: tokenizers.train_tokenizer(LINES[:400], vocab_size=400, model_type=model_type)
  assert train() == train()


def test_training_keeps_indentation_and_newline_pieces(tokenizer):
  assert len(tokenizer.encode('        ')) < 8
  assert len(tokenizer.encode('\n')) == 1
  assert len(tokenizer.encode('2026')) == 4  # Digits are split.


def test_no_text_to_train_on_is_a_clear_error():
  with pytest.raises(ValueError, match='give more text'):
    tokenizers.train_tokenizer([], vocab_size=400)


def test_another_model_file_is_refused(tmp_path):
  path = tmp_path / 'x.model'
  path.write_bytes(b'not a model')
  with pytest.raises(ValueError, match='not a SentencePiece model'):
    tokenizers.Tokenizer(path).encode('a')
