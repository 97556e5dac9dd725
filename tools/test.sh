#!/usr/bin/env bash
# Run the tests.  Without an active environment, creates one in .venv with the interpreter PYTHON and installs llmjax.
# Arguments are passed to pytest: tools/test.sh tests/ops -k rope.  `tools/test.sh -m slow` runs the slow tests only.
# LLMJAX_TEST_PLATFORM=cuda TEST_WORKERS=1 tools/test.sh tests/ops tests/train uses the machine's GPU instead of eight
# emulated CPU devices; tests that need more devices are skipped (see tests/conftest.py).
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
install_llmjax '.[test]'
exec python -m pytest -n "${TEST_WORKERS:-$(nproc)}" -m 'not slow' "$@"
