"""The attention grid: batch 8, one head, every row of the table, forward and backward, memory
between."""

from __future__ import annotations

from typing import Any

import torch
from attention_bench import DTYPES, AttentionBench
from cases import Selection, refuse_unmet

from cs336_systems.accounting import attention_flops
from cs336_systems.attention import ATTENTION
from cs336_systems.measure.pytest_plugin import GpuBenchmark
from cs336_systems.measure.record import Case
from cs336_systems.measure.workload import Workload

BATCH_SIZE = 8
ROUNDS = 100


def sweep(chosen: Selection) -> tuple[str, list[tuple[Any, ...]]]:
    """Every row at every dtype, head dim and sequence length, forward and backward."""
    return "attention, dtype, head_dim, seq, which", [
        (row, dtype, head_dim, seq, which)
        for row in chosen.rows
        for dtype in chosen.dtypes
        for head_dim in chosen.head_dims
        for seq in chosen.seqs
        for which in ("forward", "backward")
    ]


SWEEPS = {"bench_attention_grid": sweep}


def bench_attention_grid(
    gpu_benchmark: GpuBenchmark,
    chosen: Selection,
    attention: str,
    dtype: str,
    head_dim: int,
    seq: int,
    which: str,
) -> None:
    """Time one pass of one attention row on (8, seq, head_dim), causal."""
    case = Case(
        study="attention_grid",
        params={"attention": attention, "dtype": dtype, "d": head_dim, "seq": seq, "pass": which},
        clock="gpu_ms",
        cache="cold",
        rounds=ROUNDS,
        flops=attention_flops(BATCH_SIZE, 1, seq, head_dim, which, is_causal=True),
        flops_dtype=dtype,
        baseline={"attention": "scaled_dot_prod_attention"},
    )

    def build() -> Workload:
        refuse_unmet(attention, chosen.device, dtype, head_dim)
        torch.compiler.reset()  # A shape of its own is compiled for that shape alone.
        size, function = (BATCH_SIZE, seq, head_dim), ATTENTION[attention].load()
        return AttentionBench(function, size, DTYPES[dtype], chosen.device).workload(which)

    gpu_benchmark(case, build=build)
