"""What each idea of the Hopper kernels is worth: one switched off at a time, kernels alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import triton
from attention_bench import Shape
from cases import Selection, refuse_unmet
from flash_cases import ROUNDS
from torch import Tensor

from cs336_systems.attention.hopper_launch import (
    BACKWARD,
    FORWARD,
    FOUR_GROUPS,
    THREE_GROUPS,
    BackwardTile,
    ForwardTile,
    backward_tile,
    forward_tile,
    plan_hopper_backward,
    plan_hopper_forward,
)
from cs336_systems.attention.tiles import ROWS_MULTIPLE
from cs336_systems.attention.triton_launch import plan_postprocess, plan_preprocess
from cs336_systems.measure.pytest_plugin import GpuBenchmark
from cs336_systems.measure.record import Case
from cs336_systems.measure.workload import Workload

STUDY = "hopper_ladder"
NOTHING = "nothing"
ROW = "flash_attention_hopper"
SHAPES = tuple(
    Shape(batch, 16, seq, d, causal)
    for d in (64, 128)
    for batch, seq in ((1, 16384), (8, 2048))
    for causal in (True, False)
)
# By pass and head dim, what is changed and to what; a switch is thrown where None is given.
CHANGES: dict[tuple[str, int], dict[str, Any]] = {
    ("forward", 64): {
        "threes": None,
        "early": None,
        "ping_pong": None,
        "persistent": None,
    },
    ("forward", 128): {
        "threes": None,
        "early": None,
        "ping_pong": None,
        "persistent": None,
        "hold": None,
    },
    ("backward", 64): {"hold_k": None, "hold_v": None, "persistent": None},
    ("backward", 128): {"hold_v": None, "persistent": None},
}
OF_THREE_GROUPS = ("persistent",)
"""What of it can be changed where three groups work together, a kernel of its own."""


class Rung(NamedTuple):
    """One pass on one shape with one field of its tile changed, or nothing."""

    shape: Shape
    which: str
    changed: str
    tile: ForwardTile | BackwardTile

    def __str__(self) -> str:
        return f"{self.shape}-{self.which}-{self.changed}".replace(" ", "-")


def rungs(shape: Shape, which: str) -> list[Rung]:
    """Return a pass as it is shipped, and with each change."""
    shipped: Any = forward_tile(shape.d, shape.seq, causal=shape.causal)
    if which == "backward":
        shipped = backward_tile(shape.d, shape.seq, causal=shape.causal)
    found = [Rung(shape, which, NOTHING, shipped)]
    for field, value in CHANGES[which, shape.d].items():
        if shipped == THREE_GROUPS and field not in OF_THREE_GROUPS:
            continue
        other = not getattr(shipped, field) if value is None else value
        changed = replace(shipped, **{field: other})
        found.append(Rung(shape, which, f"{field} = {other}", changed))
    if shape.d == 64:
        two: Any = (BACKWARD[64], THREE_GROUPS)
        if which == "forward":
            two = (FORWARD[64], FOUR_GROUPS)
        (other_kernel,) = (tile for tile in two if tile != shipped)
        changed_to = f"num_groups = {other_kernel.num_groups}"
        found.append(Rung(shape, which, changed_to, other_kernel))
    return found


def sweep(chosen: Selection) -> tuple[str, list[Any]]:
    """Every change on every shape, on a GPU only: elsewhere the kernels do not run."""
    wanted = SHAPES if chosen.device.type == "cuda" and not chosen.gate else ()
    found = [
        rung
        for shape in wanted
        for which in ("forward", "backward")
        if which in chosen.passes
        for rung in rungs(shape, which)
    ]
    return "rung", [pytest.param(rung, id=str(rung)) for rung in found]


SWEEPS = {"bench_hopper_ladder": sweep}


def bench_hopper_ladder(gpu_benchmark: GpuBenchmark, chosen: Selection, rung: Rung) -> None:
    """Time the kernels of one pass, without autograd, and hold their results to the shipped ones.

    The backward pass includes what goes before its kernel (D, a buffer of zeros) and after it.
    """
    shape, which, changed, tile = rung
    params = {"shape": str(shape), "pass": which, "changed": changed, **shape._asdict()}
    case = Case(
        study=STUDY,
        params=params,
        clock="gpu_ms",
        cache="cold",
        rounds=ROUNDS,
        flops=shape.flops(which),
        flops_dtype="bf16",
        baseline={"changed": NOTHING},
    )

    def build() -> Workload:
        refuse_unmet(ROW, chosen.device, "bf16", shape.d)
        kernels = Kernels(shape, chosen.device)
        if which == "forward":
            assert isinstance(tile, ForwardTile)
            return Workload(step=kernels.forward(tile), check=lambda: kernels.check_forward(tile))
        assert isinstance(tile, BackwardTile)
        return Workload(step=kernels.backward(tile), check=lambda: kernels.check_backward(tile))

    gpu_benchmark(case, build=build)


class Kernels:
    """The kernels' launches on one shape, with memory for all that they write."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        batch, heads, seq, head_dim, self._causal = shape
        size = (batch, heads, seq, head_dim)
        self._q, self._k, self._v, self._do = (
            torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(4)
        )
        self._num_rows = triton.cdiv(seq, ROWS_MULTIPLE) * ROWS_MULTIPLE
        self._o, self._lse = self._new_output()
        self._shipped = backward_tile(head_dim, seq, causal=self._causal)
        self._shipped_forward = forward_tile(head_dim, seq, causal=self._causal)
        self._forward(self._shipped_forward, self._o, self._lse)()

    def forward(self, tile: ForwardTile) -> Callable[[], None]:
        """Return the launch of the forward pass."""
        return self._forward(tile, *self._new_output())

    def backward(self, tile: BackwardTile) -> Callable[[], None]:
        """Return the three launches of the backward pass as one call."""
        return self._backward(tile, *self._new_gradients())

    def check_forward(self, tile: ForwardTile) -> None:
        """Hold O and L to the shipped ones bit by bit. Other tiles of keys round P on another
        scale: by half an eps, as O, so two kernels differ by at most twice an eps of |P| |V|."""
        o, lse = self._new_output()
        self._forward(tile, o, lse)()
        if tile.block_n != self._shipped_forward.block_n:
            eps = torch.finfo(torch.bfloat16).eps
            bound, _ = self._new_output()
            self._forward(self._shipped_forward, bound, torch.empty_like(lse), self._v.abs())()
            assert ((o.float() - self._o.float()).abs() <= 2 * eps * bound.float()).all()
            torch.testing.assert_close(lse, self._lse, rtol=0, atol=2**-18)
            return
        assert torch.equal(o, self._o)
        assert torch.equal(lse, self._lse)

    def check_backward(self, tile: BackwardTile) -> None:
        """Hold dK and dV to the shipped ones bit by bit, dQ to what another order changes; the
        other kernel's, which takes D off elsewhere, to its roundings."""
        wanted, got = self._new_gradients(), self._new_gradients()
        self._backward(self._shipped, *wanted)()
        self._backward(tile, *got)()
        eps = torch.finfo(torch.bfloat16).eps
        if tile.num_groups != self._shipped.num_groups:
            for one, other in zip(got, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=2 * eps, atol=2**-10)
            return
        torch.testing.assert_close(got[0], wanted[0], rtol=eps, atol=2**-20)
        assert torch.equal(got[1], wanted[1])
        assert torch.equal(got[2], wanted[2])

    def _new_output(self) -> tuple[Tensor, Tensor]:
        lse = self._q.new_empty(self._q.shape[:-1], dtype=torch.float32)
        return torch.empty_like(self._q), lse

    def _new_gradients(self) -> list[Tensor]:
        return [torch.empty_like(tensor) for tensor in (self._q, self._k, self._v)]

    def _forward(
        self, tile: ForwardTile, o: Tensor, lse: Tensor, v: Tensor | None = None
    ) -> Callable[[], None]:
        v = self._v if v is None else v
        return plan_hopper_forward(
            self._q, self._k, v, o, lse, causal=self._causal, scale=self._scale, tile=tile
        ).run

    def _backward(
        self, tile: BackwardTile, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> Callable[[], None]:
        rows = (*self._q.shape[:2], self._num_rows)
        lse2, delta = (self._q.new_empty(rows, dtype=torch.float32) for _ in range(2))
        sums = lse2.new_empty((lse2.numel(), self._q.shape[3]))
        launches = (
            plan_preprocess(
                self._o, self._do, self._lse, lse2, delta, sums, fragments=True
            ),
            plan_hopper_backward(
                self._q, self._k, self._v, self._do, lse2, delta, sums, dk, dv,
                causal=self._causal, scale=self._scale, tile=tile,
            ),
            plan_postprocess(sums, dq, self._num_rows, self._scale, fragments=True),
        )  # fmt: skip

        def run() -> None:
            for launch in launches:
                launch.run()

        return run

    @property
    def _scale(self) -> float:
        return self._q.shape[3] ** -0.5
