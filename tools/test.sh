#!/usr/bin/env bash
# Runs the tests.  On a fresh machine it first makes an environment in .venv and installs llmjax there;
# PYTHON names the interpreter to make it with.  Arguments go to pytest: tools/test.sh tests/ops -k rope
# `tools/test.sh -m slow` runs what is left out here: more of the same, on more meshes.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
install_llmjax '.[test]'
exec python -m pytest -n "${TEST_WORKERS:-$(nproc)}" -m 'not slow' "$@"
