#!/bin/bash
# sbatch examples/cluster/slurm.sh run.yaml [section.key=value ...]
#SBATCH --job-name=finetrainers
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# Two minutes before its time is up the job is asked to stop, and saves; in the queue again it goes on.
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
  --nnodes "$SLURM_NNODES" \
  --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$head:29500" \
  --max-restarts 3 \
  -m finetrainers train "$@"
