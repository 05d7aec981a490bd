"""Training on several ranks is training on one: every strategy, whatever the model is like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parallel_fixtures import AVERAGING, BACKENDS, ON_RANKS, cases
from parallel_models import FEATURES, Case, Trained, train_alone, train_with_all
from ranks import pool
from torch import Tensor

pytestmark = ON_RANKS
STRATEGIES = [*AVERAGING, "torch_ddp"]
# Four steps of a few hundred operations each, amplified by what AdamW divides by.
NUM_ROUNDINGS = 2.0**14
ALL = frozenset(FEATURES)
# An example is twenty training runs or so.
fewer = settings(max_examples=settings().max_examples // 2)


def everything(double: bool, **changes: object) -> Case:
    settings: dict[str, Any] = {
        "seed": 1,
        "widths": (3, 5, 7, 2),
        "features": ALL,
        "double": double,
        "adamw": True,
        "num_micro_batches": 2,
        "samples": (2, 3, 2, 4),
        "bucket_size_mb": 1e-4,
    }
    settings |= changes
    if settings["num_micro_batches"] > 1:
        settings["features"] -= {"aliased"}
    return Case(**settings)


def largest_error(got: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Return the largest difference, relative to 1 or to the largest value."""
    assert got.keys() == truth.keys()
    scale = max(1.0, *(t.double().abs().max().item() for t in truth.values() if t.numel()))
    errors = [
        (got[name].double() - truth[name].double()).abs().max().item() / scale
        for name in truth
        if truth[name].numel()
    ]
    return max(errors)


def present(trained: Trained) -> dict[str, Tensor]:
    return {name: grad for name, grad in trained.grads.items() if grad is not None}


def same_bits(a: Trained, b: Trained) -> bool:
    return (
        a.grads.keys() == b.grads.keys()
        and present(a).keys() == present(b).keys()
        and all(torch.equal(a.state[name], b.state[name]) for name in a.state)
        and all(torch.equal(grad, b.grads[name]) for name, grad in present(a).items())
        and a.norms == b.norms
    )


@st.composite
def worlds(draw: st.DrawFn) -> tuple[int, Case]:
    world_size = draw(st.integers(1, 4))
    return world_size, draw(cases(world_size))


def check_training(world_size: int, case: Case, backend: str) -> None:
    by_rank = pool(world_size, backend).run(train_with_all, case, STRATEGIES)
    truth = train_alone(case, world_size, double=True)
    alone = train_alone(case, world_size, double=False)
    eps = torch.finfo(torch.float64 if case.double else torch.float32).eps
    # The same sums in another order: what torch's wrapper and one process err, or must.
    peers = (by_rank[0]["torch_ddp"], alone)
    for strategy in AVERAGING:
        trained = by_rank[0][strategy]
        for other in by_rank[1:]:
            assert same_bits(trained, other[strategy]), strategy
        assert present(trained).keys() == present(truth).keys(), strategy
        for what in ("state", "grads"):
            got, wanted = getattr(trained, what), getattr(truth, what)
            got, wanted = ({k: v for k, v in d.items() if v is not None} for d in (got, wanted))
            errors = [
                largest_error({k: getattr(peer, what)[k] for k in wanted}, wanted) for peer in peers
            ]
            budget = NUM_ROUNDINGS * eps if case.double else 3 * max(*errors, 16 * eps)
            assert largest_error(got, wanted) <= budget, (strategy, what, errors)
        norms = torch.tensor(trained.norms, dtype=torch.float64)
        torch.testing.assert_close(norms.float(), torch.tensor(truth.norms), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@example((1, everything(True)))
@example((2, everything(True, num_micro_batches=3)))
@example((3, everything(False)))
@example((3, everything(True, num_micro_batches=1, in_place_mb=0)))
@example((3, everything(True, num_micro_batches=1, in_place_mb=3e-5, bucket_size_mb=None)))
@example((4, everything(True, widths=(1, 1), features=frozenset(), bucket_size_mb=None)))
@example((2, everything(False, features=ALL - {"zeroed", "two_forwards"}, bucket_size_mb=25)))
@given(worlds())
@fewer
def test_training_equals_one_process_on_the_whole_batch(world: tuple[int, Case]) -> None:
    check_training(*world, "gloo")


@pytest.mark.multigpu(2)
@example(everything(True))
@example(everything(True, num_micro_batches=1, in_place_mb=0))
@example(everything(True, num_micro_batches=1, in_place_mb=3e-5, bucket_size_mb=None))
@given(cases(2))
@fewer
def test_training_equals_one_process_on_gpus(case: Case) -> None:
    check_training(2, case, "nccl")


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@fewer
def test_strategies_give_the_same_bits_on_two_ranks(data: st.DataObject, backend: str) -> None:
    # Two numbers have one sum: no order of adding them explains a difference.
    case = data.draw(cases(2))
    trained = pool(2, backend).run(train_with_all, case, list(AVERAGING))[0]
    for strategy in AVERAGING[1:]:
        if backend == "gloo":
            assert same_bits(trained[strategy], trained["naive"]), strategy
        else:  # On a GPU a norm is summed in an order that depends on where gradients lie.
            torch.testing.assert_close(trained[strategy].state, trained["naive"].state)
