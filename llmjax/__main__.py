"""`python -m llmjax <command>` is the console script `llmjax <command>`."""

from llmjax.main import main

if __name__ == '__main__':
  main()
