"""llmjax: the whole life of a language model, in JAX, on any device mesh."""

__version__ = '0.1.0'
