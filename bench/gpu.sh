#!/usr/bin/env bash
# What to run on a GPU: one command of at most eight minutes, in order of worth.
#
#   bash bench/gpu.sh [FOLDER [PART...]]
#
# PARTs are tests, decode, training, prefill and transformers; all of them unless some are named.
# FOLDER (bench/results) gets the rows in gpu.jsonl, as they come, and the output of each part in
# gpu-PART.txt. Each part has a time limit of its own, and its last lines are shown, however it ends.
# It needs no network. With SMALL=1 all is so small that a CPU does it: for a test of this script.
set -uo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.."
parts=" ${*:2} "
mkdir -p "$out"
export PYTHONUNBUFFERED=1
deadline=470
failed=0

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begin=$SECONDS status=0
    shift 2
    [[ $parts = "  " || $parts = *" $name "* ]] || return 0
    [ $((deadline - SECONDS)) -lt "$limit" ] && limit=$((deadline - SECONDS))
    # one interrupt, to the main process alone: pytest then still sums up
    timeout --foreground -s INT -k 8 "$limit" "$@" > "$out/gpu-$name.txt" 2>&1 || status=$?
    tail -n 40 "$out/gpu-$name.txt" | cut -c 1-300
    echo "== $name: $((SECONDS - begin)) s, exit code $status"
    [ $status = 0 ] || failed=1
}

tests="-vv -rfE -p no:cacheprovider --tb=short -n 12"
decode="--batches 16 1"
step="" prefill="" theirs=""
if [ "${SMALL:-}" ]; then
    export OMP_NUM_THREADS=1
    small="--shape tiny"
    tests="--collect-only -q -n 0"
    decode="$small --contexts 256 --window 16 --batches 1 --steps 1 --memory 0.002"
    step="$small --lengths 128 --repeat 1"
    prefill="$small --lengths 256 --window 16 --repeat 1"
    theirs="$small --contexts 256 --batches 1 --steps 1"
fi
rows="--out $out/gpu.jsonl"
part tests 110 python3 -m pytest $tests tests/test_kernels.py
part decode 145 python3 bench/decode.py $decode --profile $rows
part training 85 python3 bench/retrofit_step.py $step --profile $rows
part prefill 60 python3 bench/prefill.py $prefill --profile $rows
part transformers $deadline python3 bench/transformers_decode.py $theirs $rows  # all that is left
exit $failed
