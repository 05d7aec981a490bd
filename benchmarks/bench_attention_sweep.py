"""Forward passes of attention over tiers of lengths, as many queries as keys and not."""

from __future__ import annotations

from typing import Any

import torch
from attention_bench import DTYPES, AttentionBench
from cases import Selection, refuse_unmet
from sweep_cases import Pair

from cs336_systems.accounting import attention_bytes, attention_flops
from cs336_systems.attention import ATTENTION
from cs336_systems.measure.pytest_plugin import GpuBenchmark
from cs336_systems.measure.record import Case
from cs336_systems.measure.workload import Workload


def sweep(chosen: Selection) -> tuple[str, list[tuple[Any, ...]]]:
    """Every kernel on every pair of lengths, kernels innermost."""
    swept = chosen.sweep
    names = "attention, dtype, head_dim, queries, keys, batch, heads, causal"
    if swept is None:
        return names, []
    return names, [
        (kernel, dtype, head_dim, *pair, swept.batch, swept.heads, swept.causal)
        for dtype in swept.dtypes
        for head_dim in swept.head_dims
        for pair in swept.pairs
        for kernel in swept.kernels
    ]


SWEEPS = {"bench_attention_sweep": sweep}


def bench_attention_sweep(
    gpu_benchmark: GpuBenchmark,
    chosen: Selection,
    attention: str,
    dtype: str,
    head_dim: int,
    queries: int,
    keys: int,
    batch: int,
    heads: int,
    causal: bool,
) -> None:
    """Time the forward pass of one kernel on q (batch, heads, queries, d), k and v of keys."""
    assert chosen.sweep is not None
    pair = Pair(queries, keys)
    size = (batch, heads, queries, head_dim)
    case = Case(
        study="attention_sweep",
        params={
            "attention": attention,
            "dtype": dtype,
            "d": head_dim,
            "tier": pair.tier,
            "queries": queries,
            "keys": keys,
            "ratio": pair.ratio,
            "batch": batch,
            "heads": heads,
            "causal": causal,
        },
        clock="gpu_ms",
        cache="cold",
        flops=attention_flops(*size, "forward", is_causal=causal, num_keys=keys),
        flops_dtype=dtype,
        least_bytes=attention_bytes(
            *size, "forward", element_bytes=DTYPES[dtype].itemsize, num_keys=keys
        ),
        baseline={"attention": chosen.sweep.baseline},
    )

    def build() -> Workload:
        refuse_unmet(attention, chosen.device, dtype, head_dim)
        torch.compiler.reset()  # A shape of its own is compiled for that shape alone.
        bench = AttentionBench(
            ATTENTION[attention].load(),
            size,
            DTYPES[dtype],
            chosen.device,
            is_causal=causal,
            num_keys=keys,
        )
        return bench.workload("forward")

    gpu_benchmark(case, build=build)
