#!/usr/bin/env bash
#SBATCH --job-name=llmjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --output=llmjax-%j.log
set -euo pipefail
srun --kill-on-bad-exit=1 llmjax pretrain --config=configs/pretrain/quickstart.py --workdir=/shared/runs/a --config.sample.prompts='it'"'"'s a' --config.train.steps=200
