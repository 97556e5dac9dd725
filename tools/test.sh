#!/usr/bin/env bash
# Runs the tests.  On a fresh machine it first makes an environment in .venv and installs llmjax there;
# PYTHON names the interpreter to make it with.  Arguments go to pytest: tools/test.sh tests/ops -k rope
# `tools/test.sh -m slow` runs what is left out here: more of the same, on more meshes.
# LLMJAX_TEST_PLATFORM=cuda TEST_WORKERS=1 tools/test.sh tests/ops tests/train runs tests on the machine's GPU and not on
# eight emulated CPU devices; those that need more devices than there are say so and are skipped (see tests/conftest.py).
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
install_llmjax '.[test]'
exec python -m pytest -n "${TEST_WORKERS:-$(nproc)}" -m 'not slow' "$@"
