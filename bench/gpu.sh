#!/usr/bin/env bash
# What to run on a GPU, in order of worth: four commands, each of nine minutes at most. One that is
# cut leaves the rows that it has measured.
#
#   bash bench/gpu.sh tests       the kernels and the captured step against the plain functions
#   bash bench/gpu.sh decode      the kernel's bandwidth; decode steps, and the most of one memory
#   bash bench/gpu.sh long        a training step and a prefill, of 8,192 and 32,768 tokens
#   bash bench/gpu.sh beside      transformers' decoding; the toy's retrofit
#
# A second argument is the folder of the results files, bench/results/gpu if there is none. With
# SMALL=1 all is so small that a CPU can do it: a test of this script.
set -uo pipefail
cd "$(dirname "$0")/.."
what=${1:?tests, decode, long or beside}
out=${2:-bench/results/gpu}
mkdir -p "$out"
limit=540
end=$((SECONDS + limit))
failed=0

run() { # a command, for as long as is left of the nine minutes; the next one has its turn in any case
    timeout $((end - SECONDS > 1 ? end - SECONDS : 1)) "$@" || failed=$?
}

if [ "${SMALL:-}" ]; then
    decode="--shape qwen3-0.6b --layers 1 --contexts 256 --batches 1 --steps 1 --memory 0.01
        --kernel-batches 1 --kernel-bytes 1000000 --crs 1 8 --window 16"
    step="--layers 1 --lengths 128 --repeat 1"
    prefill="--layers 1 --lengths 256 --repeat 1"
    theirs="--layers 1 --contexts 256 --batches 1 --steps 1"
    toy="--steps 2 --eval-problems 1 --eval-rows 1"
    tests="--collect-only -q"
else
    decode="--batches 1 64"
    step="--lengths 8192 32768"
    prefill="--shape qwen3-8b --layers 36 --dtype bfloat16 --lengths 8192 32768"
    theirs="--batches 1 64"
    toy=""
    tests="-q -n 12"
fi

case $what in
tests)
    run python -m pytest $tests tests/test_kernels.py tests/test_training_attention.py \
        tests/test_generate.py > "$out/tests.txt" 2>&1
    tail -n 100 "$out/tests.txt"
    ;;
decode) run python bench/decode.py $decode --out "$out/decode.json" ;;
long)
    run python bench/retrofit_step.py $step --out "$out/retrofit-step.json"
    run python bench/prefill.py $prefill --out "$out/prefill.json"
    ;;
beside)
    run python bench/transformers_decode.py $theirs --out "$out/transformers.json"
    run python retrofit.py $toy --out "$out/toy"
    ;;
*) echo "$what: tests, decode, long or beside" && exit 2 ;;
esac
exit $failed
