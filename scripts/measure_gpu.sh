#!/usr/bin/env bash
# Make the committed GPU numbers, one part a call (each under ten minutes on an H200):
#   scripts/measure_gpu.sh PART DIRECTORY     PART: one of those listed below
# The parts of fused attention, estimated from a quarter of a second a case and three or four seconds
# for each shape that torch compiles: flash_sweep_bf16 and flash_sweep_fp32 (the rows that are not
# compiled) 6 minutes each, flash_sweep_compiled 5, flash_shapes (the shapes that matter, the public
# harness) 6, flash_details (host-bound calls, fp32, errors) 5. The sweep as a whole does not fit.
# An interrupted part leaves DIRECTORY/PART.json.journal.jsonl, which the report reads as well.
set -euo pipefail
parts="basics, large, xl, 2.7b, warmup, attention, whole, flash_sweep_bf16, flash_sweep_fp32,\
 flash_sweep_compiled, flash_shapes, flash_runs, flash_details, hopper_ladder, all_reduce,\
 data_parallel, data_parallel_bf16, data_parallel_buckets, copy_engines, scaling, train_loop,\
 lm_matrix, attention_sweep"
part=${1:?name a part: $parts}
out=${2:?name the directory for the JSON files}
cd "$(dirname "$0")/.."
export PYTHONPATH=.:cs336-basics PYTHONUNBUFFERED=1

measure() { # measure NAME ARGUMENTS...: one pytest run, one JSON
    local name=$1
    shift
    python3 -m pytest -p no:xdist "--benchmark-json=$out/$name.json" --max-seconds=12 "$@"
}

model=benchmarks/bench_model.py
flash=benchmarks/bench_flash.py
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
flash_sweep_bf16 | flash_sweep_fp32)
    measure "$part" $flash --dtypes="${part##*_}" --max-seconds=1 \
        -k "flash_sweep and not compiled and not flex"
    ;;
flash_sweep_compiled)
    measure "$part" $flash --dtypes=bf16 --head-dims=64,128 --max-seconds=1 \
        -k "flash_sweep and (compiled or flex)"
    ;;
flash_shapes)
    measure attention_shapes $flash -k attention_shapes --max-seconds=2
    measure attention_harness benchmarks/bench_flash_harness.py --max-seconds=2
    ;;
flash_runs)
    # What compiles most, flash-attn-4, does so in every run: 75 s each.
    for run in 1 2 3; do
        measure "attention_shapes_run$run" $flash -k attention_shapes --max-seconds=0.3 \
            --rows=flash_attention_hopper,flash_attention_triton,sdpa_cudnn,flash_attn_4
    done
    python3 -m cs336_systems.report repeats "$out"/attention_shapes_run?.json
    ;;
hopper_ladder) measure "$part" benchmarks/bench_hopper_ladder.py --max-seconds=1 ;;
flash_details)
    measure flash_details $flash --max-seconds=2 -k "not flash_sweep and not attention_shapes"
    ;;
data_parallel) measure "$part" benchmarks/bench_data_parallel.py -k "not buckets and not scaling"
    ;;
data_parallel_bf16)
    measure "$part" benchmarks/bench_data_parallel.py -k "not buckets and not scaling" --communications=bf16
    ;;
copy_engines)
    measure "$part" benchmarks/bench_data_parallel.py -k "not buckets and not scaling" --ranks=2 \
        --rank-batch=24 --strategies=none,flashddp,flashddp_ce,torch_ddp
    ;;
data_parallel_buckets) measure "$part" benchmarks/bench_data_parallel.py -k buckets ;;
scaling) measure "$part" benchmarks/bench_data_parallel.py -k scaling ;;
train_loop) measure "$part" benchmarks/bench_train_loop.py ;;
lm_matrix) measure "$part" benchmarks/bench_lm_matrix.py ;;
attention_sweep) measure "$part" benchmarks/bench_attention_sweep.py ;;
all_reduce) measure all_reduce benchmarks/bench_all_reduce.py --max-seconds=10 ;;
*)
    echo "measure_gpu.sh: PART must be one of $parts, got '$part'" >&2
    exit 2
    ;;
esac
