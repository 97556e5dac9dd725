#!/usr/bin/env bash
#SBATCH --job-name=llmjax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=1:00:00
#SBATCH --output=llmjax-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
#SBATCH --requeue
set -euo pipefail
for ((attempt = 0; ; attempt++)); do
  status=0
  srun --kill-on-bad-exit=1 llmjax pretrain --config=configs/pretrain/quickstart.py --workdir=/shared/runs/a --config.sample.prompts='it'"'"'s a' --config.train.steps=200 || status=$?
  if ((status == 75)); then exec scontrol requeue "$SLURM_JOB_ID"; fi
  if ((status == 0 || status == 2 || status == 130 || attempt >= 3)); then exit "$status"; fi
  sleep $((2 ** attempt))
done
