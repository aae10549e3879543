#!/usr/bin/env bash
# What needs a GPU, each part with a time limit; results go to $OUT as small text files.
#   OUT=gpu_results benchmarks/gpu.sh [PATH_OF_CIFAR10]
# The table of training_speed.py needs TIMM (a checkout of timm) and PEERS (benchmarks/requirements.txt).
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_results}
IMAGES=${1:-data/raw/cifar10}
mkdir -p "$OUT"

part() { # part NAME SECONDS COMMAND...
    local name=$1 seconds=$2 status=0
    shift 2
    timeout "$seconds" "$@" >"$OUT/$name.txt" 2>&1 || status=$?
    echo "$name: exit $status" | tee -a "$OUT/summary.txt"
}

part tests 240 python -m pytest -q tests/test_gpu.py
part peak 240 python benchmarks/peak.py --rounds 3 --compile true
part attacks 90 python benchmarks/compare_attacks.py --images "$IMAGES" --limit 512 --batch_size 128
if [ -n "${TIMM:-}" ] && [ -n "${PEERS:-}" ]; then
    part training 240 python benchmarks/training_speed.py --images "$IMAGES" --timm "$TIMM" \
        --peers "$PEERS" --settings 224,pgd --rounds 1 --workers 8
fi
