"""Training with sharded weights is training with whole ones, whatever the model is like."""

from __future__ import annotations

from dataclasses import replace

import fsdp_runs
import pytest
import torch
import torch.distributed as dist
from fsdp_models import FEATURES, OPTIMIZERS, Case, Trained, same_bits, train_alone, train_on_rank
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parallel_fixtures import BACKENDS, ON_RANKS, TWO_GPUS
from ranks import pool
from torch import Tensor, nn

from cs336_systems.parallel import wrap
from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.collectives import communication_device

pytestmark = ON_RANKS
# Four steps of a few hundred operations each, amplified by norms of few numbers and by what AdamW
# divides by.
NUM_ROUNDINGS = 2.0**14
# The layers of a block are run by themselves or through the block, recomputed or not.
EXCLUSIVE = frozenset({"layer_by_layer", "side_output", "checkpointed"})


def frozen(*features: str) -> frozenset[str]:
    return frozenset(features)


# On rank 1 the first block has all its gradients before those of the others have come.
ENDS_EARLY = Case(
    features=frozen("detached", "repeated"),
    num_micro_batches=2,
    options={"reshard_after_forward": False},
)


# Rank 0's gradients pass a frozen block; on rank 1 none comes to it.
PASSED_ON_ONE_RANK = Case(depth=2, features=frozen("detached", "frozen_all"))
# Of two passes, the second one's backward comes first and ends early on one rank; with more units
# than are gathered ahead, the others must be gathered before the first one's begin.
FIRST_OF_TWO_ENDS_EARLY = Case(
    depth=1, features=frozen("layer_by_layer", "detached", "frozen_some", "two_forwards")
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    features = draw(st.frozensets(st.sampled_from(FEATURES), max_size=6))
    for extra in sorted(features & EXCLUSIVE)[1:]:
        features -= {extra}
    options = {
        "reshard_after_forward": draw(st.booleans()),
        "checkpoint_blocks": False,
    }
    if not features & EXCLUSIVE:
        options["checkpoint_blocks"] = draw(st.sampled_from([False, True, 1]))
    return Case(
        seed=draw(st.integers(0, 999)),
        # The norm of one or two numbers is a sign, whose gradient magnifies rounding errors.
        width=draw(st.integers(3, 9)),
        hidden=draw(st.integers(1, 9)),
        depth=draw(st.integers(1, 5)),
        features=features,
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        num_micro_batches=draw(st.integers(1, 3)),
        num_samples=draw(st.integers(1, 3)),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        options=options,
    )


def largest_error(got: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Return the largest difference, relative to 1 or to the largest value."""
    assert got.keys() == truth.keys()
    scale = max([1.0, *(t.double().abs().max().item() for t in truth.values())])
    differences = [got[name].double() - truth[name].double() for name in truth]
    assert all(got[name].shape == truth[name].shape for name in truth)
    return max((d.abs().max().item() for d in differences), default=0.0) / scale


def optimizer_tensors(trained: Trained) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": torch.as_tensor(value)
        for number, values in trained.optimizer["state"].items()
        for name, value in values.items()
        if value is not None
    }


def norms_of(trained: Trained) -> dict[str, Tensor]:
    return {"norms": torch.tensor(trained.norms, dtype=torch.float64)}


def check_training(world_size: int, case: Case, backend: str = "gloo") -> None:
    by_rank = pool(world_size, backend).run(train_on_rank, case)
    truth = train_alone(case, world_size, dtype=torch.float64)
    # One process in the same dtype sums in another order; some drawn models magnify that.
    plain = train_alone(case, world_size)
    got = by_rank[0]
    for trained in by_rank:
        assert same_bits(trained.state, got.state)
        assert trained.norms == got.norms
    assert {tensor.dtype for tensor in got.state.values()} == {case.dtype}
    eps = torch.finfo(case.dtype).eps
    for part in (lambda trained: trained.state, norms_of, optimizer_tensors):
        mine, theirs, exact = part(got), part(plain), part(truth)
        budget = NUM_ROUNDINGS * eps + 4 * largest_error(theirs, exact)
        assert largest_error(mine, exact) <= budget
    assert bool(optimizer_tensors(got)) == (case.optimizer != "sgd")


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(world_size=st.integers(1, 4), case=cases())
@example(world_size=4, case=Case(width=1, hidden=1, depth=1, num_samples=1))
@example(world_size=3, case=Case(features=frozen("tied", "checkpointed"), num_micro_batches=2))
@example(world_size=2, case=Case(features=frozen("tied", "two_forwards", "repeated")))
@example(world_size=2, case=ENDS_EARLY)
@example(world_size=2, case=PASSED_ON_ONE_RANK)
@example(world_size=2, case=Case(features=frozen("frozen_some", "frozen_all", "side_output")))
@example(world_size=2, case=FIRST_OF_TWO_ENDS_EARLY)
@example(world_size=2, case=replace(FIRST_OF_TWO_ENDS_EARLY, depth=3))
def test_training_equals_one_process(backend: str, world_size: int, case: Case) -> None:
    if backend == "nccl":
        world_size = 2
    check_training(world_size, case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_alone(feature: str, backend: str) -> None:
    case = Case(features=frozen(feature), optimizer="adamw", dtype=torch.float64)
    check_training(2, replace(case, num_micro_batches=2), backend)


@pytest.mark.parametrize("world_size", [1, 2])
def test_sgd_has_the_bits_of_one_process(world_size: int) -> None:
    """One process that takes the ranks' parts of the batch one after the other; with more than two
    ranks the order of the sum would be the backend's."""
    case = Case(num_steps=3, features=frozen("bias"))
    alone = train_alone(case, world_size, whole=False)
    for trained in pool(world_size).run(train_on_rank, case):
        assert same_bits(trained.state, alone.state)


def exact_net(dtype: torch.dtype) -> nn.Module:
    """Build a model whose training with small integers rounds nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Linear(3, 2, bias=False)).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape))
    return net


def exact_steps(net: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        net(tokens).sum(-1).mean().backward()
        if isinstance(net, DataParallel):
            net.finish_gradient_synchronization()
        optimizer.step()
    return dict(net.full_state_dict() if isinstance(net, DataParallel) else net.state_dict())


def exact_on_rank(tokens: Tensor) -> dict[str, Tensor]:
    device = communication_device()
    part = tokens.chunk(dist.get_world_size())[dist.get_rank()].to(device)
    return exact_steps(wrap(exact_net(torch.float32).to(device), "fsdp"), part)


@pytest.mark.parametrize(
    ("world_size", "backend"), [(2, "gloo"), (4, "gloo"), pytest.param(2, "nccl", marks=TWO_GPUS)]
)
def test_sgd_has_the_bits_of_the_whole_batch_where_nothing_is_rounded(
    world_size: int, backend: str
) -> None:
    tokens = torch.arange(8).reshape(8, 1) % 5
    alone = exact_steps(exact_net(torch.float32), tokens)
    truth = exact_steps(exact_net(torch.float64), tokens)
    assert same_bits({name: value.double() for name, value in alone.items()}, truth)
    for state in pool(world_size, backend).run(exact_on_rank, tokens):
        assert same_bits(state, alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", [(), ("bias", "two_forwards"), ("frozen_all",)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_errs_no_more_than_fully_shard(
    features: tuple[str, ...], optimizer: str, backend: str
) -> None:
    case = Case(features=frozen(*features), optimizer=optimizer, num_micro_batches=2)
    truth = train_alone(case, 2, dtype=torch.float64).state
    ours, torchs = (
        largest_error(pool(2, backend).run(train_on_rank, case, strategy)[0].state, truth)
        for strategy in ("fsdp", "torch_fsdp2")
    )
    assert ours <= 2 * torchs + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("fp32_wire", [False, True])
def test_low_precision_errs_no_more_than_fully_shard(
    dtype: torch.dtype, fp32_wire: bool, backend: str
) -> None:
    wire = torch.float32 if fp32_wire else None
    options = {"compute_dtype": dtype, "communication_dtype": wire}
    case = Case(width=8, hidden=16, options=options, num_samples=4)
    truth = train_alone(case, 2, dtype=torch.float64).state
    ours, torchs = (
        largest_error(pool(2, backend).run(train_on_rank, case, strategy)[0].state, truth)
        for strategy in ("fsdp", "torch_fsdp2")
    )
    assert 0 < ours <= 2 * torchs + torch.finfo(dtype).eps * 2**-7
    assert ours < torch.finfo(dtype).eps


def test_autocast_errs_as_one_process_does() -> None:
    case = Case(width=8, hidden=16, num_samples=4)
    truth = train_alone(case, 2, dtype=torch.float64).state
    got = pool(2).run(fsdp_runs.train_under_autocast, case)[0].state
    with torch.autocast("cpu", torch.bfloat16):
        alone = train_alone(case, 2).state
    assert 0 < largest_error(got, truth) <= 3 * largest_error(alone, truth)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 3])
def test_gradients_fit_their_pieces(world_size: int, dtype: torch.dtype | None) -> None:
    case = Case(features=frozen("bias"), options={"compute_dtype": dtype})
    by_rank = pool(world_size).run(fsdp_runs.describe_gradients, case)
    net = fsdp_runs.initial_net(case)
    layers = [m for m in net.modules() if hasattr(m, "weight") and m.weight.ndim == 2]
    weights = {p for layer in layers for p in layer.parameters()}
    for found in by_rank:
        assert found["none_before"]
        assert found["names"] == [name for name, _ in net.named_parameters()]
        assert found["fit"]
        assert found["dtypes"] == {torch.float32}
        assert found["dims"] == {1}
        assert set(found["num_storages"].values()) == {1}
    assert sum(found["numel"] for found in by_rank) == sum(p.numel() for p in weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_can_add_up_in_shards(backend: str) -> None:
    case = Case(num_micro_batches=3, dtype=torch.float64)
    truth = train_alone(case, 2).state
    for trained, num_reduced in pool(2, backend).run(fsdp_runs.accumulate_in_shards, case):
        assert largest_error(trained.state, truth) <= NUM_ROUNDINGS * 2.0**-52
        num_units = case.depth + 2
        assert num_reduced == num_units * case.num_micro_batches * case.num_steps
