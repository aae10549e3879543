#!/usr/bin/env bash
# What needs a GPU, in at most 12 minutes: each part has a time limit. Results go to $OUT as small
# text files.
#   OUT=gpu_results benchmarks/gpu.sh [PATH_OF_CIFAR10]
# The table of training_speed.py needs TIMM (a checkout of timm) and PEERS (benchmarks/requirements.txt),
# and 4 minutes more.
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

RUN=${TMPDIR:-/tmp}/speedrun
part tests 120 python -m pytest -q tests/test_gpu.py
part speedrun 450 python benchmarks/speedrun.py --images "$IMAGES" --output "$RUN"
part peak 90 python benchmarks/peak.py --rounds 2 --compile true
part attacks 60 python benchmarks/compare_attacks.py --images "$IMAGES" --limit 512 --batch_size 128
cp "$RUN/metrics.csv" "$RUN/summary.json" "$OUT" 2>/dev/null
if [ -n "${TIMM:-}" ] && [ -n "${PEERS:-}" ]; then
    part training 240 python benchmarks/training_speed.py --images "$IMAGES" --timm "$TIMM" \
        --peers "$PEERS" --settings 224,pgd --rounds 1 --workers 8
fi
