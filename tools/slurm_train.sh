#!/usr/bin/env bash
# usage: slurm_train.sh PARTITION JOB CONFIG WORK_DIR [ARGUMENTS]
set -x
PYTHONPATH="$(dirname "$0")/..":$PYTHONPATH srun -p "$1" --job-name="$2" \
    --gres=gpu:"${GPUS_PER_NODE:-8}" --ntasks="${GPUS:-8}" \
    --ntasks-per-node="${GPUS_PER_NODE:-8}" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 $SRUN_ARGS \
    python -u tools/train.py "$3" --work-dir="$4" --launcher=slurm "${@:5}"
