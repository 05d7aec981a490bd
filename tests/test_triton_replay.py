"""Plans that are run again on other tensors: what goes where, and when it is planned anew.

Triton's interpreter compiles nothing, so kernels are stand-ins here that note what they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cs336_systems.attention import triton_run
from cs336_systems.attention.flash_triton import FlashAttentionTriton
from cs336_systems.attention.triton_replay import Plan


class Described:
    """A descriptor: of what, and in which blocks."""

    block_shape = (64, 64)

    def __init__(self, base: Tensor) -> None:
        self.base = base


class FakeLaunch:
    """A launch whose kernel fills results by a function of all its arguments."""

    num_programs = 3
    constants = ("table",)

    def __init__(self, arguments: dict[str, Any], fill: Callable[..., None]) -> None:
        self.arguments, self._fill = arguments, fill
        self.kernel = SimpleNamespace(params=[SimpleNamespace(name=name) for name in arguments])

    def run(self) -> Any:
        self._fill(*self.arguments.values())
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid == (self.num_programs, 1, 1)
        return self._fill


def test_other_tensors_take_the_places_of_those_planned_with() -> None:
    def fill(
        source: Described, number: int, table: Tensor, scratch: Tensor, result: Tensor
    ) -> None:
        scratch.copy_(source.base * number)
        result.copy_(scratch + table)

    x, scratch, result = torch.ones(2, 3), torch.empty(2, 3), torch.empty(3, 2).t()
    arguments = {
        "source": Described(x),
        "number": 5,
        "table": torch.ones(1),  # the same for all inputs, so neither an input nor a result
        "scratch": scratch,
        "result": result,
    }
    replay = Plan(
        [FakeLaunch(arguments, fill)], {"x": x}, {"result": result, "scratch": scratch}
    ).run([])  # type: ignore[list-item]
    assert torch.equal(result, torch.full((2, 3), 6.0))
    assert replay is not None
    first, other_scratch = replay.run([torch.full((2, 3), 2.0)])
    assert torch.equal(first, torch.full((2, 3), 11.0))
    assert first.stride() == result.stride()
    assert first.data_ptr() != result.data_ptr()
    assert other_scratch.data_ptr() != scratch.data_ptr()
    assert torch.equal(result, torch.full((2, 3), 6.0))


class Planned:
    """Stands in for planning; O = 2 q, dQ = 3 dO, dK = 5 k, dV = 7 v."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.keys_looked_up: list[str] = []
        planned = self

        class Replays(dict[Any, Any]):
            def get(self, key: Any, default: Any = None) -> Any:
                planned.keys_looked_up.append(key[0])
                return super().get(key, default)

        monkeypatch.setattr(triton_run, "_REPLAYS", Replays())
        monkeypatch.setattr(triton_run, "_plan_forward", self.forward)
        monkeypatch.setattr(triton_run, "_plan_backward", self.backward)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Plan:
        self.names.append("forward")
        made = {"o": torch.empty_like(q), "lse": q.new_empty(q.shape[:-1])}

        def fill(q: Tensor, o: Tensor, lse: Tensor) -> None:
            o.copy_(2 * q)
            lse.zero_()

        launch: Any = FakeLaunch({"q": q, **made}, fill)
        return Plan([launch], {"q": q, "k": k, "v": v}, made)

    def backward(self, views: list[Tensor], lse: Tensor, *_: Any) -> Plan:
        self.names.append("backward")
        do, q, k, v, o = views
        made = {name: torch.empty_like(like) for name, like in (("dq", q), ("dk", k), ("dv", v))}

        def fill(
            do: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
        ) -> None:  # fmt: skip
            dq.copy_(3 * do)
            dk.copy_(5 * k)
            dv.copy_(7 * v)

        launch: Any = FakeLaunch({"do": do, "k": k, "v": v, **made}, fill)
        return Plan([launch], {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse}, made)


def step(seed: int, layout: Callable[[Tensor], Tensor] = lambda do: do) -> None:
    """Run both passes on new inputs, and check whose results they are."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    do = layout(torch.randn(1, 2, 8, 16))
    o = FlashAttentionTriton.apply(q, k, v, True)
    assert torch.equal(o, 2 * q)
    gradients = torch.autograd.grad(o, (q, k, v), do)
    for got, expected in zip(gradients, (3 * do, 5 * k, 7 * v), strict=True):
        assert torch.equal(got, expected)


def test_a_pass_is_planned_once_and_found_again_without_its_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = Planned(monkeypatch)
    for seed in range(4):
        step(seed)
    assert planned.names == ["forward", "backward"]
    # The backward pass's key is made until a replayed forward pass knows what follows it.
    assert planned.keys_looked_up == [*["forward", "backward"] * 2, "forward", "forward"]


def test_gradients_laid_out_otherwise_are_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = Planned(monkeypatch)
    for seed in range(3):
        step(seed)
        step(seed, lambda do: do.transpose(1, 2).contiguous().transpose(1, 2))
    assert planned.names == ["forward", "backward", "backward"]


def test_hooks_may_lay_out_anew_what_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """As offloading does: the addresses are others, and so may be the strides."""
    planned = Planned(monkeypatch)
    for seed in range(3):
        step(seed)

    def unpack(tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() < 4 else tensor.transpose(1, 2).contiguous().transpose(1, 2)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        step(7)
    assert planned.names == ["forward", "backward", "backward"]


def test_other_settings_are_other_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = Planned(monkeypatch)
    q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    for deterministic in (False, True, False, True, False, True):
        o = FlashAttentionTriton.apply(q, k, v, True, None, deterministic)
        torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    assert planned.names == ["forward", "backward", "backward"]
    FlashAttentionTriton.apply(q, k, v, False)
    FlashAttentionTriton.apply(q, k, v, True, 0.5)
    assert planned.names[3:] == ["forward", "forward"]
