"""Tokenizers: SentencePiece training, loading, streaming decode."""
