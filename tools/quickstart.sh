#!/usr/bin/env bash
# Train a small language model: the commands of the README's quickstart.  The same command resumes.
# Arguments are overrides of the training config, such as --config.train.steps=100.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
install_llmjax .
workdir=${WORKDIR:-runs/quickstart}

show() { printf '\n$ %s\n' "$*"; "$@"; }
show llmjax prepare --config=configs/data/python_docs.py
show llmjax pretrain --config=configs/pretrain/quickstart.py --workdir="$workdir" "$@"
show llmjax evaluate --workdir="$workdir"
show llmjax generate --workdir="$workdir" --prompt='def read_' --max-new-tokens=120
printf '\nopen %s/report.html\n' "$workdir"
