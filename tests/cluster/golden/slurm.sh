#!/usr/bin/env bash
#SBATCH --job-name=llmjax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --partition=gpu
#SBATCH --account=research
#SBATCH --output=llmjax-%j.log
#SBATCH --signal=TERM@180
#SBATCH --exclusive
#SBATCH --qos=high
set -euo pipefail
source .venv/bin/activate
srun --cpus-per-task=12 --kill-on-bad-exit=1 llmjax pretrain --config=configs/pretrain/quickstart.py --workdir=/shared/runs/a --config.sample.prompts='it'"'"'s a' --config.train.steps=200
