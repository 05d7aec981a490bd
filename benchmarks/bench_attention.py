"""The attention grid: batch 8, one head, every row of the table, forward and backward, memory
between."""

from __future__ import annotations

import math
from typing import Any

import torch
from cases import DTYPES, Selection, refuse_unmet

from cs336_systems.accounting import attention_flops
from cs336_systems.attention import ATTENTION
from cs336_systems.attention.reference import reference_attention
from cs336_systems.measure.memory import saved_bytes
from cs336_systems.measure.pytest_plugin import GpuBenchmark
from cs336_systems.measure.record import Case
from cs336_systems.measure.workload import Workload

BATCH_SIZE = 8
ROUNDS = 100
CHECKED_ROWS = 64
"""Query rows, counted from the last, compared with fp64: the rows that see the most keys."""


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
        refuse_unmet(attention, chosen.device, dtype)
        shape = (BATCH_SIZE, seq, head_dim)
        return AttentionBench(attention, shape, DTYPES[dtype], chosen.device).workload(which)

    gpu_benchmark(case, build=build)


class AttentionBench:
    """Random inputs for one row, and the two passes over them."""

    def __init__(
        self, kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        torch.compiler.reset()  # A shape of its own is compiled for that shape alone.
        torch.manual_seed(0)
        self._function = ATTENTION[kind].load()
        self._device = device
        self._inputs = [
            torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)
        ]
        self._grad_output = torch.randn(shape, dtype=dtype, device=device)
        self._output: torch.Tensor | None = None

    def workload(self, which: str) -> Workload:
        """Return the forward pass, or the backward pass with a fresh forward before every round."""
        if which == "forward":
            return Workload(step=self._forward, setup=self._drop, check=self._check)
        return Workload(
            step=self._backward,
            setup=self._forward,
            check=self._check,
            metrics=self._memory_before_backward,
            count=lambda: {"saved_bytes": saved_bytes(self._forward)},
        )

    def _drop(self) -> None:
        self._output = None

    def _forward(self) -> None:
        self._output = None
        self._output = self._function(*self._inputs, is_causal=True)

    def _backward(self) -> None:
        assert self._output is not None
        torch.autograd.grad(self._output, self._inputs, self._grad_output)

    def _memory_before_backward(self) -> dict[str, float | None]:
        self._forward()
        if self._device.type != "cuda":
            return {}
        torch.cuda.synchronize(self._device)
        return {"before_backward_bytes": float(torch.cuda.memory_allocated(self._device))}

    def _check(self) -> None:
        """Hold the last rows to twice the error of the plain formula in the same precision, and
        rounding."""
        self._forward()
        assert self._output is not None
        with torch.no_grad():
            got = self._output[0, -CHECKED_ROWS:]
            q, k, v = (tensor[0] for tensor in self._inputs)
            seen = torch.arange(q.shape[0], device=q.device)
            mask = seen[-CHECKED_ROWS:, None] >= seen[None, :]
            scores = q[-CHECKED_ROWS:] @ k.T / math.sqrt(q.shape[-1])
            plain = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ v
            truth = _last_rows_in_fp64(q, k, v, mask)
        # Twice what the plain formula errs here, and what rounding sums and the result errs at
        # the least.
        rounding = (
            torch.finfo(torch.float32).eps * v.abs().max()
            + torch.finfo(q.dtype).eps * truth.abs().max()
        )
        budget = (2 * (plain - truth).abs().max() + rounding).item()
        error = (got - truth).abs().max().item()
        assert error <= budget, f"max error {error:.2e} against fp64, budget {budget:.2e}"


def _last_rows_in_fp64(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    # Row by row on the keys it sees: the reference without a mask is the causal reference.
    first = q.shape[0] - mask.shape[0]
    rows = [
        reference_attention(q[row : row + 1], k[: row + 1], v[: row + 1])[0]
        for row in range(first, q.shape[0])
    ]
    return torch.cat(rows)
