#!/bin/sh
# Check and time the loss on a GPU, in less than five minutes, with PyTorch and
# Triton alone; writes gpu_loss.json and gpu_loss.md.
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/benchmark_loss.py --device cuda \
    --json gpu_loss.json >gpu_loss.md
