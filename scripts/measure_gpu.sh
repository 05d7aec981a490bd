#!/usr/bin/env bash
# Make the committed GPU numbers, one part a call (each under ten minutes on an H200):
#   scripts/measure_gpu.sh PART DIRECTORY     PART: basics, large, xl, 2.7b, warmup, attention, whole
# An interrupted part leaves DIRECTORY/PART.json.journal.jsonl, which the report reads as well.
set -euo pipefail
part=${1:?name a part: basics, large, xl, 2.7b, warmup, attention, whole}
out=${2:?name the directory for the JSON files}
cd "$(dirname "$0")/.."
export PYTHONPATH=.:cs336-basics PYTHONUNBUFFERED=1

measure() { # measure NAME ARGUMENTS...: one pytest run, one JSON
    local name=$1
    shift
    python3 -m pytest -p no:xdist "--benchmark-json=$out/$name.json" --max-seconds=12 "$@"
}

model=benchmarks/bench_model.py
case $part in
basics)
    measure numerics benchmarks/bench_numerics.py benchmarks/bench_harness.py
    measure small_medium $model --sizes=small,medium
    ;;
warmup) measure warmup benchmarks/bench_warmup.py ;;
large | xl | 2.7b) measure "$part" $model --sizes="$part" ;;
whole) measure whole $model --sizes=small,medium,large --contexts=1024 --precisions=bf16 --compile-modes=model ;;
attention)
    measure attention_bf16 benchmarks/bench_attention.py --dtypes=bf16 --head-dims=64,128 --max-seconds=2
    measure attention_fp32 benchmarks/bench_attention.py --dtypes=fp32 --max-seconds=2 \
        --rows=scaled_dot_prod_attention,vectorized_torch,scaled_dot_prod_attention_compiled,sdpa
    ;;
*)
    echo "measure_gpu.sh: PART must be one of basics, large, xl, 2.7b, warmup, attention, whole, got '$part'" >&2
    exit 2
    ;;
esac
