#!/usr/bin/env bash
#SBATCH --job-name emo
#SBATCH --ntasks-per-node 1
#SBATCH --signal B:TERM@120
#
# sbatch --nodes N --gpus-per-node G examples/multi_node/slurm.sh TRAIN_FLAGS
# One task per node: a launcher that starts a process per GPU (without --gpus-per-node: NPROC, or
# 1). Two minutes before the time is up, and on scancel --batch --signal TERM, SIGTERM goes on to
# every launcher, and from there to its processes: they save and end with 75. Submitted again with
# --resume auto --save_strategy steps, the run goes on.
set -euo pipefail
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${HOSTS%%$'\n'*}
cd "${SLURM_SUBMIT_DIR:?submit it from the repository with sbatch}"
srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m stanford_alpaca.launch \
    --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-${NPROC:-1}}" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d \
    --rdzv_endpoint "$HEAD:$((20000 + SLURM_JOB_ID % 10000))" \
    -m stanford_alpaca.train "$@" &
trap 'kill -TERM $! 2>/dev/null' TERM
wait $! && exit # a trapped signal ends the wait early: then wait for srun itself
wait $!
