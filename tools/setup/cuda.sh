#!/bin/sh
# Print what mmcv is to be built for: cpu, or e.g. cu130 where there are a GPU
# and an nvcc that suits torch; to stderr, why a GPU stays unused.
# usage: cuda.sh VENV [/dev]
set -eu
kind=cpu dev=${2:-/dev} home=${CUDA_HOME:-${CUDA_PATH:-/usr/local/cuda}}
if [ "${FORCE_CUDA:-}" != 0 ] && ls "$dev" | grep -q '^nvidia[0-9]\|^dxg$'; then
    nvcc=$(PATH="$home/bin:$PATH" nvcc --version 2>/dev/null |
        sed -n 's/.*release \([0-9.]*\).*/\1/p')
    # read, as importing torch would take seconds of every make
    torch=$(sed -n "s/^cuda\b.*'\([0-9.]*\)'.*/\1/p" \
        "$1"/lib/python3*/site-packages/torch/version.py 2>/dev/null) || true
    case ${nvcc%%.*},${torch%%.*} in
    *,) why='torch is a CPU build' ;;
    ,*) why='there is no working nvcc' ;;
    "${torch%%.*},${nvcc%%.*}") kind=cu$(echo "$torch" | tr -d .) ;;
    *) why="nvcc is of CUDA $nvcc, torch of CUDA $torch" ;;
    esac
    [ "$kind" != cpu ] || echo "mmcv gets no CUDA operators, as $why: the GPU\
 stays unused (docs/en/install.md)" >&2
fi
echo "$kind"
