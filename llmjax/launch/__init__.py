"""Starting one llmjax command as many processes: here, on TPU VMs, under Slurm, on GKE."""
