"""Direct launches: the same arguments to the same launcher as Triton's own way, less often made.

The launcher is Triton's, around a compiled one that takes notes; nothing runs on a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.nvidia import driver
from triton.compiler import CompiledKernel

from cs336_systems.attention.hopper_launch import plan_hopper_backward, plan_hopper_forward
from cs336_systems.attention.triton_direct import KNOWN_TRITON
from cs336_systems.attention.triton_launch import Launch
from cs336_systems.attention.triton_replay import Plan, Replay

pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith(KNOWN_TRITON), reason=f"reaches into Triton {KNOWN_TRITON}x"
)
_FIRST = len("iiiKKppOOOOOO")
"""Arguments of a compiled launcher before the kernel's own."""


class Notes:
    """A driver that notes what it is asked to describe and to launch."""

    def __init__(self) -> None:
        self.described: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
        self.launched: list[tuple[Any, ...]] = []

    def fill(self, address: int, *how: Any) -> tuple[str, int, tuple[int, ...]]:
        shape, strides = tuple(how[4]), tuple(how[5])
        self.described.append((address, shape, strides))
        return ("map", address, shape)

    def launch(self, *arguments: Any) -> None:
        self.launched.append(arguments)

    def seen(self) -> list[tuple[Any, ...]]:
        """Return what was launched: tensors as the addresses that the launcher asks them for, and
        nothing of hooks."""
        plain = [
            tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
            for arguments in self.launched
        ]
        return [(*each[: _FIRST - 3], *each[_FIRST:]) for each in plain]


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    notes = Notes()
    active = SimpleNamespace(
        utils=SimpleNamespace(fill_tma_descriptor=notes.fill),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 7,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    return notes


def compiled(launch: Launch, notes: Notes) -> Any:
    """Return what `launch.run` returns on a GPU, as far as launches know it."""
    values = [launch.arguments[p.name] for p in launch.kernel.params]
    signature = {
        at: "tensordesc<bf16[64, 64]>" if hasattr(value, "block_shape") else "i32"
        for at, value in enumerate(values)
    }
    metas = [
        {
            "swizzle": 3,
            "elem_size": 2,
            "elem_type": next(iter(driver.TMA_DTYPE_DEVICE_TO_HOST)),
            "block_size": value.block_shape,
            "fp4_padded": False,
        }
        for value in values
        if hasattr(value, "block_shape")
    ]
    launcher = object.__new__(driver.CudaLauncher)
    launcher.num_ctas = 1
    launcher.launch = driver.wrap_handle_tensordesc(notes.launch, signature, metas)
    launcher.global_scratch_size = launcher.profile_scratch_size = 0
    launcher.global_scratch_align = launcher.profile_scratch_align = 1
    launcher.launch_cooperative_grid = launcher.launch_pdl = False
    kernel = object.__new__(CompiledKernel)
    kernel.__dict__.update(
        _run=launcher, name="k", function=11, packed_metadata=(4, 1, 0), module=1, src=None,
        _init_handles=lambda: None,
    )  # fmt: skip
    return kernel


class _Ready(Launch):
    """A launch whose first run makes a compiled kernel and launches nothing."""

    notes: Notes

    def run(self) -> Any:
        return compiled(self, self.notes)


def plan(notes: Notes, *, backward: bool) -> Plan:
    q, k, v, do, o = (torch.zeros(1, 2, 128, 64, dtype=torch.bfloat16) for _ in range(5))
    lse = torch.zeros(1, 2, 128)
    if not backward:
        launches = [plan_hopper_forward(q, k, v, o, lse, causal=True, scale=0.1)]
        inputs, results = {"q": q, "k": k, "v": v}, {"o": o, "lse": lse}
    else:
        dq, dk, dv = (torch.zeros_like(q) for _ in range(3))
        lse2, delta = torch.zeros(1, 2, 128), torch.zeros(1, 2, 128)
        sums = torch.zeros(256, 64)
        # Those before and after it are Triton's, which tests interpret.
        launches = [
            plan_hopper_backward(q, k, v, do, lse2, delta, sums, dk, dv, causal=True, scale=0.1)
        ]
        inputs = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse}
        results = {
            "dq": dq, "dk": dk, "dv": dv, "lse2": lse2, "delta": delta, "dq_sum": sums
        }  # fmt: skip
    ready = []
    for launch in launches:
        made = _Ready(
            kernel=launch.kernel, num_programs=launch.num_programs, arguments=launch.arguments,
            options=launch.options, constants=launch.constants,
        )  # fmt: skip
        object.__setattr__(made, "notes", notes)
        ready.append(made)
    return Plan(ready, inputs, results)


def first_run(planned: Plan, switch: str) -> Replay:
    """Return what repeats a plan, with the switch on or off."""
    with mock.patch.dict("os.environ", {"CS336_DIRECT_LAUNCH": switch}):
        replay = planned.run([])
    assert replay is not None
    return replay


def replayed(planned: Plan, switch: str, inputs: list[Tensor]) -> None:
    """Run a plan again, with results at given addresses."""
    replay = first_run(planned, switch)
    assert all((step.direct is not None) == (switch == "1") for step in replay.steps)
    with mock.patch.object(torch, "empty_strided", side_effect=planned.results.values()):
        replay.run(inputs)


@pytest.mark.parametrize("backward", [False, True])
def test_the_launcher_is_called_as_by_triton(notes: Notes, backward: bool) -> None:
    planned = plan(notes, backward=backward)
    inputs = [torch.zeros_like(tensor) for tensor in planned.inputs.values()]
    replayed(planned, "0", inputs)
    by_triton, described = notes.seen(), notes.described.copy()
    notes.launched.clear()
    notes.described.clear()
    replayed(planned, "1", inputs)
    assert len(by_triton) == 1
    assert notes.seen() == by_triton
    assert notes.described == described


def test_a_description_is_made_once_for_each_address(notes: Notes) -> None:
    planned = plan(notes, backward=False)
    replay = first_run(planned, "1")
    (step,) = replay.steps
    assert step.direct is not None
    for address in (64, 128, 64, 128):
        assert step.direct.run([address] * 5)
    assert sorted({address for address, *_ in notes.described}) == [64, 128]
    assert len(notes.described) == 2 * len(step.descriptors)
    for address in range(1, 400):
        step.direct.run([address] * 5)
    assert all(len(known) <= 256 for _, _, known, _ in step.direct.descriptors)


def test_hooks_get_triton_s_own_launch(notes: Notes) -> None:
    planned = plan(notes, backward=False)
    replay = first_run(planned, "1")
    (step,) = replay.steps
    assert step.direct is not None
    hook = triton.knobs.runtime.launch_enter_hook

    def noted(_: Any) -> None:
        """What a profiler adds."""

    hook.add(noted)
    try:
        assert not step.direct.run([0] * 5)
        assert not notes.launched
        replay.run([torch.zeros_like(tensor) for tensor in planned.inputs.values()])
        assert len(notes.launched) == 1
    finally:
        hook.remove(noted)


def test_scratch_memory_is_left_to_triton(notes: Notes) -> None:
    planned = plan(notes, backward=False)

    def with_scratch(launch: Launch, notes: Notes) -> Any:
        kernel = real(launch, notes)
        kernel.run.global_scratch_size = 128
        return kernel

    real = compiled
    with mock.patch(f"{__name__}.compiled", with_scratch):
        replay = first_run(planned, "1")
    assert [step.direct for step in replay.steps] == [None]
