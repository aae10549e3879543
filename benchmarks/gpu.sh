#!/usr/bin/env bash
# What needs a GPU, in 12 minutes and two calls, of which the second needs the first one's network:
#   OUT=gpu_results benchmarks/gpu.sh PATH_OF_CIFAR10 training      # at most 480 s
#   OUT=gpu_results benchmarks/gpu.sh PATH_OF_CIFAR10 evaluation    # at most 240 s
# Each part has a time limit, and the last ones run only if those before leave time. Results go to $OUT
# as small text files; summary.txt has the seconds of each part, start included.
# The table of training_speed.py needs TIMM (a checkout of timm) and PEERS (benchmarks/requirements.txt),
# and 4 minutes more.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_results}
IMAGES=${1:-data/raw/cifar10}
CALL=${2:-training}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # also where the package is not installed
mkdir -p "$OUT"
END=$((SECONDS + $([ "$CALL" = training ] && echo 480 || echo 240)))

part() { # part NAME SECONDS COMMAND...
    local name=$1 left=$((END - SECONDS)) status=0 start=$SECONDS
    local seconds=$(($2 < left ? $2 : left))
    shift 2
    if ((seconds <= 0)); then
        echo "$name: no time left" | tee -a "$OUT/summary.txt"
        return
    fi
    timeout "$seconds" "$@" >"$OUT/$name.txt" 2>&1 || status=$?
    echo "$name: exit $status, $((SECONDS - start)) s" | tee -a "$OUT/summary.txt"
}

RUN=${TMPDIR:-/tmp}/speedrun
if [ "$CALL" = training ]; then
    part tests 120 python -m pytest -v -x tests/test_gpu.py
    part speedrun 360 python benchmarks/speedrun.py --images "$IMAGES" --output "$RUN"
    cp "$RUN/metrics.csv" "$RUN/summary.json" "$OUT" 2>/dev/null
    exit
fi
evaluation() { # evaluation NAME SECONDS OPTION...
    part "$1" "$2" python inference/evaluate.py --checkpoint "$RUN" --out "$RUN/$1" \
        --data.name folder --data.root "$IMAGES" --curves false "${@:3}"
}
evaluation pgd 40 --attacks pgd --steps 100
evaluation pgd_compiled 120 --attacks pgd --steps 100 --compile true
evaluation pgd_compiled_again 40 --attacks pgd --steps 100 --compile true # code from torch's cache
part peak 120 python benchmarks/peak.py --rounds 1 --compile true
part attacks 60 python benchmarks/compare_attacks.py --images "$IMAGES" --limit 512 --batch_size 128
evaluation autoattack 120 --attacks autoattack
evaluation autoattack_compiled 120 --attacks autoattack --compile true
if [ -n "${TIMM:-}" ] && [ -n "${PEERS:-}" ]; then
    END=$((SECONDS + 240))
    part training 240 python benchmarks/training_speed.py --images "$IMAGES" --timm "$TIMM" \
        --peers "$PEERS" --settings 224,pgd --rounds 1 --workers 8
fi
