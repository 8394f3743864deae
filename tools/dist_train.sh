#!/usr/bin/env bash
# usage: dist_train.sh CONFIG GPUS [ARGUMENTS]
tools=$(dirname "$0")
PYTHONPATH="$tools/..":$PYTHONPATH python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" --nproc_per_node="$2" \
    "$tools/train.py" "$1" --launcher pytorch "${@:3}"
