"""What goes wrong on one rank or on all: everybody learns of it, nobody hangs, training goes on."""

from __future__ import annotations

import parallel_cases as ranks_do
import pytest
from parallel_fixtures import AVERAGING, BACKENDS, ON_RANKS
from ranks import pool

pytestmark = [*ON_RANKS, pytest.mark.parametrize("backend", BACKENDS)]
EVERY = pytest.mark.parametrize("strategy", AVERAGING)
OVERLAPPING = ["overlapped", "flashddp", "flashddp_ce"]
LAYER = "(5, 5) strides (5, 1) float32 trainable"
BIAS = "(5,) strides (1,) float32 trainable"
SAME = "wrap: module must be the same on every rank, got "

DIFFERENCES = {
    "count": ("nothing more", f"parameter layers.4.weight {LAYER}"),
    "shape": (
        f"parameter layers.1.weight {LAYER}",
        "parameter layers.1.weight (6, 5) strides (5, 1) float32 trainable",
    ),
    "dtype": (
        f"parameter layers.1.weight {LAYER}",
        "parameter layers.1.weight (5, 5) strides (5, 1) float64 trainable",
    ),
    "order": (f"parameter layers.0.weight {LAYER}", f"parameter layers.0.bias {BIAS}"),
    "frozen": (
        f"parameter layers.0.bias {BIAS}",
        "parameter layers.0.bias (5,) strides (1,) float32 fixed",
    ),
    "strides": (
        f"parameter layers.0.weight {LAYER}",
        "parameter layers.0.weight (5, 5) strides (1, 5) float32 trainable",
    ),
    "tied": (
        f"parameter layers.1.weight {LAYER}",
        "parameter layers.1.weight tied to layers.0.weight",
    ),
    "buffer": ("nothing more", "buffer extra (1,) strides (1,) float32 fixed"),
    "option": ("option find_unused=False", "option find_unused=True"),
    "strategy": ("strategy naive", "strategy none"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize(("world_size", "odd_rank"), [(2, 0), (2, 1), (3, 1)])
def test_another_model_on_one_rank_is_the_same_error_on_all(
    difference: str, world_size: int, odd_rank: int, backend: str
) -> None:
    if backend == "nccl":
        world_size, odd_rank = 2, odd_rank % 2
    errors = pool(world_size, backend).run(ranks_do.wrap_unequal, "naive", difference, odd_rank)
    others, odd = DIFFERENCES[difference]
    even_ranks = [rank for rank in range(world_size) if rank != odd_rank]
    parts = [
        f"{odd!r} on rank {odd_rank}",
        f"{others!r} on rank{'s' if len(even_ranks) > 1 else ''} {', '.join(map(str, even_ranks))}",
    ]
    assert set(errors) == {SAME + " and ".join(parts if odd_rank == 0 else parts[::-1])}


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        ("empty", "module must have parameters, got none"),
        ("all frozen", "module must have a trainable parameter, got 8 frozen"),
        ("no module", "module must be a torch.nn.Module, got str"),
    ],
)
def test_an_unfit_module_on_one_rank_is_an_error_of_all(
    difference: str, text: str, backend: str
) -> None:
    errors = pool(2, backend).run(ranks_do.wrap_unequal, "flashddp", difference, 1)
    assert errors == [f"wrap: {text} on rank 1"] * 2


UNFIT = {
    "empty": "wrap: module must have parameters, got none",
    "all frozen": "wrap: module must have a trainable parameter, got 8 frozen",
    "no module": "wrap: module must be a torch.nn.Module, got str",
    "lazy": "wrap: module must be initialised, got lazy 'weight'",
    "two devices": "wrap: module must be on one device, got {device} and meta",
    "meta": "wrap: module must be on a device that {backend} serves, got meta",
    "0": "flashddp: bucket_size_mb must be positive or None, got 0.0",
    "-1": "flashddp: bucket_size_mb must be positive or None, got -1.0",
    "nan": "flashddp: bucket_size_mb must be positive or None, got nan",
    "in place": "flashddp: in_place_mb must be >= 0 or None, got -1",
    "torch 0": "torch_ddp: bucket_size_mb must be positive or None, got 0",
    "integers": "flashddp: communication_dtype must be floating, got torch.int32",
    "torch integers": "torch_ddp: communication_dtype must be torch.bfloat16, torch.float16 or "
    "None, got torch.float64",
    "torch finite": "torch_ddp: check_finite must be off, torch has no such check",
    "option": "wrap flashddp: option must be one of bucket_size_mb, in_place_mb, group, "
    "communication_dtype, find_unused, check_finite, broadcast_buffers, got 'bucket_mb'",
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_cannot_be_wrapped_is_said_in_one_line(kind: str, backend: str) -> None:
    device = {"gloo": "cpu", "nccl": "cuda:{rank}"}[backend]
    errors = pool(2, backend).run(ranks_do.wrap_unfit, kind)
    for rank, error in enumerate(errors):
        # Where the ranks' own texts differ all get the first one's, with its rank.
        first = kind == "two devices" and backend == "nccl"
        here = device.format(rank=0 if first else rank)
        expected = UNFIT[kind].replace("{device}", here).replace("{backend}", backend)
        assert error == expected + (" on rank 0" if first else "")


@EVERY
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad_ranks", [(0,), (1,), (0, 1)])
def test_a_gradient_that_is_not_finite_stops_the_step_on_all_ranks(
    strategy: str, value: float, bad_ranks: tuple[int, ...], backend: str
) -> None:
    run = pool(2, backend).run(ranks_do.nonfinite_step, strategy, bad_ranks, value)
    names = "ranks 0, 1" if len(bad_ranks) > 1 else f"rank {bad_ranks[0]}"
    for result in run:
        assert result["ranks"] == bad_ranks
        assert result["message"] == f"gradients must be finite, got inf or nan on {names}"
        assert result["num_grads"] == 0
        assert not result["changed"]
        assert result["num_skipped_steps"] == 1
    assert run[0]["state"] == run[1]["state"]


@EVERY
def test_finite_gradients_pass_the_check(strategy: str, backend: str) -> None:
    for result in pool(2, backend).run(ranks_do.nonfinite_step, strategy, (), 1.0):
        assert result["ranks"] is None
        assert result["changed"]
        assert result["num_skipped_steps"] == 0


@EVERY
@pytest.mark.parametrize("thaw", [False, True])
@pytest.mark.parametrize("odd_ranks", [(1,), (0, 1)])
def test_a_changed_requires_grad_is_an_error_of_all_ranks(
    strategy: str, odd_ranks: tuple[int, ...], thaw: bool, backend: str
) -> None:
    errors = pool(2, backend).run(ranks_do.refreeze, strategy, odd_ranks, thaw)
    where = f"{len(odd_ranks)} rank{'s' if len(odd_ranks) > 1 else ''}"
    assert set(errors) == {
        f"{strategy}: requires_grad must stay as it was wrapped, got a change of "
        f"'layers.1.bias' on {where}; wrap the module again"
    }


@EVERY
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_training_goes_on_after_a_pass_that_raised_on_all_ranks(
    strategy: str, where: str, backend: str
) -> None:
    for got, wanted in pool(2, backend).run(ranks_do.fail_midway, strategy, where, (0, 1)):
        assert got == wanted


@pytest.mark.parametrize("strategy", OVERLAPPING)
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_training_goes_on_after_a_backward_pass_that_raised_on_one_rank(
    strategy: str, failing_rank: int, backend: str
) -> None:
    run = pool(2, backend).run(ranks_do.fail_midway, strategy, "backward", (failing_rank,))
    for got, wanted in run:
        assert got == wanted


@EVERY
def test_sparse_gradients_are_refused(strategy: str, backend: str) -> None:
    assert set(pool(2, backend).run(ranks_do.sparse_gradient, strategy)) == {
        "data parallel: gradients must be dense, got layout torch.sparse_coo"
    }


@EVERY
def test_a_report_that_is_read_late_is_an_error_of_the_next_step(
    strategy: str, backend: str
) -> None:
    for messages in pool(2, backend).run(ranks_do.report_read_late, strategy):
        first, second, third, fourth = messages
        assert first == second == fourth == ""
        assert "got none for 'layers.2.weight' on 1 rank, 'layers.2.bias' on 1 rank" in third
