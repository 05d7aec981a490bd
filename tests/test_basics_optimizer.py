"""Does AdamW step as torch's own does, and the schedule follow its formula?"""

from __future__ import annotations

import copy
import io
import itertools
import math
from typing import Any

import pytest
import torch
from cs336_basics.optimizer import AdamW, get_cosine_lr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES: tuple[list[int], ...] = ([3, 4], [5], [], [0, 2])


def make_parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter.dtype)


# --- AdamW ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3},
        {"betas": (0.0, 0.0)},
        {"weight_decay": 0.0},
        {"lr": 0.0},
    ],
    ids=str,
)
def test_twenty_steps_equal_torch(options: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = make_parameters(dtype), make_parameters(dtype)
    optimizer = AdamW(ours, **options)
    reference = torch.optim.AdamW(theirs, **options, foreach=False)
    for step in range(20):
        for parameters, stepper in ((ours, optimizer), (theirs, reference)):
            set_gradients(parameters, step)
            stepper.step()
    assert_close(ours, theirs)
    for parameter, expected in zip(ours, theirs, strict=True):
        state = optimizer.state[parameter]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"] == 20
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
        assert_close(state["exp_avg"], reference.state[expected]["exp_avg"])
        assert_close(state["exp_avg_sq"], reference.state[expected]["exp_avg_sq"])


def test_groups_a_changing_rate_and_missing_gradients_equal_torch() -> None:
    def run(optimizer_class: Any, **extra: Any) -> list[nn.Parameter]:
        parameters = make_parameters()
        parameters[1].requires_grad_(False)
        groups = [
            {"params": parameters[:1], "weight_decay": 0.0, "lr": 0.05},
            {"params": parameters[1:3], "betas": (0.5, 0.6)},
        ]
        optimizer = optimizer_class(groups, lr=0.01, **extra)
        optimizer.add_param_group({"params": parameters[3:], "eps": 1e-2})
        for step in range(20):
            set_gradients(parameters, step)
            parameters[1].grad = None
            if step % 3 == 0:
                parameters[0].grad = None
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            optimizer.step()
        assert parameters[1] not in optimizer.state
        assert int(optimizer.state[parameters[0]]["step"]) == 13
        return parameters

    ours, theirs = run(AdamW), run(torch.optim.AdamW, foreach=False)
    assert torch.equal(ours[1], make_parameters()[1])
    assert_close(ours, theirs)


def test_training_resumes_from_a_saved_state() -> None:
    parameters = make_parameters()
    optimizer = AdamW(parameters, lr=0.1)
    for step in range(5):
        set_gradients(parameters, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = copy.deepcopy(parameters)
    restarted = AdamW(resumed, lr=0.5)
    restarted.load_state_dict(torch.load(file, weights_only=True))
    for step in range(5, 10):
        for each, stepper in ((parameters, optimizer), (resumed, restarted)):
            set_gradients(each, step)
            stepper.step()
    for parameter, expected in zip(resumed, parameters, strict=True):
        assert torch.equal(parameter, expected)


def test_training_resumes_from_a_state_of_torch() -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer, reference = AdamW(ours), torch.optim.AdamW(theirs, foreach=False)
    set_gradients(theirs, 0)
    reference.step()
    with torch.no_grad():
        for parameter, expected in zip(ours, theirs, strict=True):
            parameter.copy_(expected)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    for parameters, stepper in ((ours, optimizer), (theirs, reference)):
        set_gradients(parameters, 1)
        stepper.step()
    assert_close(ours, theirs)


def test_a_closure_is_run_with_gradients_enabled_and_its_loss_returned() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = AdamW([weight], lr=0.1, weight_decay=0.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    with torch.no_grad():
        assert optimizer.step(closure) == 4.0
    # The first step of Adam has the length of the learning rate.
    assert_close(weight.detach(), torch.tensor([1.9]))
    assert optimizer.step() is None


class CountBigTensors(TorchDispatchMode):
    """Counts operations that allocate a result as large as the parameter."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.allocating = numel, [""]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        in_place = any(result is argument for argument in args)
        if isinstance(result, Tensor) and result.numel() >= self.numel and not in_place:
            self.allocating.append(str(func))
        return result


def test_a_step_allocates_one_temporary() -> None:
    parameter = nn.Parameter(torch.ones(100))
    optimizer = AdamW([parameter])
    parameter.grad = torch.ones(100)
    optimizer.step()
    with CountBigTensors(100) as counter:
        optimizer.step()
    assert counter.allocating == ["", "aten.sqrt.default"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr must be finite and >= 0, got -0.001"),
        ({"lr": math.nan}, "lr must be finite and >= 0, got nan"),
        ({"eps": -1.0}, "eps must be finite and >= 0, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0, got -0.1"),
        ({"betas": (1.0, 0.9)}, r"betas must be two numbers in \[0, 1\), got \(1.0, 0.9\)"),
        ({"betas": (0.9, -0.1)}, r"betas must be two numbers in \[0, 1\), got \(0.9, -0.1\)"),
        ({"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\), got \(0.9,\)"),
    ],
)
def test_bad_hyperparameters_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"AdamW: {message}"):
        AdamW(make_parameters(), **options)
    with pytest.raises(ValueError, match=f"AdamW: {message}"):
        AdamW([{"params": make_parameters(), **options}])


def test_sparse_and_complex_gradients_are_refused() -> None:
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([0])).sum().backward()
    with pytest.raises(ValueError, match="AdamW: gradients must be dense and real, got sparse"):
        AdamW(embedding.parameters()).step()
    parameter = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"must be dense and real, got torch\.complex64"):
        AdamW([parameter]).step()


# --- schedule ---------------------------------------------------------------------------------


def test_the_schedule_at_its_corners() -> None:
    rates = [get_cosine_lr(it, 1.0, 0.1, 4, 12) for it in (0, 1, 3, 4, 8, 12, 13, 1000)]
    assert rates == pytest.approx([0.0, 0.25, 0.75, 1.0, 0.55, 0.1, 0.1, 0.1], abs=1e-15)


@settings(deadline=None, max_examples=100)
@given(
    warmup=st.integers(0, 20),
    extra=st.integers(0, 30),
    lowest=st.floats(0, 1),
    rise=st.floats(0, 1),
)
def test_the_schedule_rises_then_falls_within_its_bounds(
    warmup: int, extra: int, lowest: float, rise: float
) -> None:
    highest = lowest + rise
    rates = [get_cosine_lr(it, highest, lowest, warmup, warmup + extra) for it in range(60)]
    up, down = rates[: warmup + 1], rates[warmup:]
    if extra > 0:
        assert max(rates) == pytest.approx(rates[warmup])
        assert rates[warmup] == pytest.approx(highest)
        assert up == sorted(up)
    assert all(b <= a + 1e-15 for a, b in itertools.pairwise(down))
    assert all(rate == lowest for rate in rates[warmup + extra :])


def test_the_schedule_equals_torch_after_warm_up() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.1)
    for it in range(10):
        assert get_cosine_lr(it, 1.0, 0.1, 0, 10) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    ("it", "warmup", "cycle", "message"),
    [
        (-1, 0, 10, "it must be >= 0, got -1"),
        (0, 11, 10, "warmup_iters must be between 0 and cosine_cycle_iters 10, got 11"),
        (0, -1, 10, "warmup_iters must be between 0 and cosine_cycle_iters 10, got -1"),
    ],
)
def test_the_schedule_names_bad_arguments(it: int, warmup: int, cycle: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"get_cosine_lr: {message}"):
        get_cosine_lr(it, 1.0, 0.1, warmup, cycle)
