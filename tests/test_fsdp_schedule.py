"""What FSDP sends and holds, and when."""

from __future__ import annotations

import fsdp_runs
import pytest
import torch
from fsdp_models import Case, initial_net
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parallel_fixtures import BACKENDS, ON_RANKS
from ranks import pool
from torch import nn

from cs336_systems.parallel.fsdp_layout import FlatLayout
from cs336_systems.parallel.fsdp_plan import plan_units
from cs336_systems.parallel.fsdp_schedule import tensors_in

pytestmark = ON_RANKS
GATHER, REDUCE = "all_gather_into", "reduce_scatter_into"
# Two units ahead of the one in use, in both passes; the embedding's weights are not read again.
AHEAD = [
    *[(GATHER, unit) for unit in ("embedding", "blocks.0", "blocks.1", "blocks.2", "head")],
    (GATHER, "blocks.2"),
    (GATHER, "blocks.1"),
    (REDUCE, "head"),
    (GATHER, "blocks.0"),
    *[(REDUCE, unit) for unit in ("blocks.2", "blocks.1", "blocks.0", "embedding")],
]


def named_units(log: list[tuple[str, int, str]], sizes: dict[str, int]) -> list[tuple[str, str]]:
    """Tell blocks of one size apart by their turn."""
    by_size = {numel: name for name, numel in sizes.items() if not name.startswith("blocks")}
    return [
        (what, by_size.get(numel, "block")) for what, numel, _ in log if what in (GATHER, REDUCE)
    ]


def without_numbers(sequence: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(what, "block" if unit.startswith("blocks") else unit) for what, unit in sequence]


@pytest.mark.parametrize("world_size", [1, 2])
def test_collectives_run_ahead_and_once(world_size: int) -> None:
    case = Case(hidden=20, features=frozenset({"bias"}))
    sizes = pool(world_size).run(fsdp_runs.unit_sizes, case)[0]
    assert list(sizes) == ["embedding", "blocks.0", "blocks.1", "blocks.2", "head"]
    first, *later = pool(world_size).run(fsdp_runs.log_of_steps, case)[0]
    for log in (first, *later):
        others = [what for what, _, _ in log if what not in (GATHER, REDUCE)]
        # The replicated norms, the report, and the norm of the gradients.
        assert others == ["all_reduce"] * 3
        assert {dtype for what, _, dtype in log if what != "all_reduce"} == {"float32"}
    for log in later:
        assert named_units(log, sizes) == without_numbers(AHEAD)
    # Without a record there is nothing to run ahead by, but nothing is gathered twice either.
    assert sorted(named_units(first, sizes)) == sorted(without_numbers(AHEAD))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_reshard_gathers_once(backend: str) -> None:
    case = Case(options={"reshard_after_forward": False})
    log = pool(2, backend).run(fsdp_runs.log_of_steps, case)[0][-1]
    assert [what for what, _, _ in log].count(GATHER) == 5
    assert [what for what, _, _ in log].count(REDUCE) == 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wire", [None, torch.float32])
def test_weights_and_gradients_travel_in_low_precision(
    wire: torch.dtype | None, backend: str
) -> None:
    options = {"compute_dtype": torch.bfloat16, "communication_dtype": wire}
    log = pool(2, backend).run(fsdp_runs.log_of_steps, Case(options=options))[0][-1]
    assert {dtype for what, _, dtype in log if what == GATHER} == {"bfloat16"}
    reduced = {dtype for what, _, dtype in log if what == REDUCE}
    assert reduced == {"float32" if wire else "bfloat16"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulation_reduces_once(backend: str) -> None:
    log = pool(2, backend).run(fsdp_runs.log_of_steps, Case(num_micro_batches=3))[0][-1]
    assert [what for what, _, _ in log].count(REDUCE) == 5
    assert [what for what, _, _ in log].count(GATHER) == 3 * 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_weights_are_gathered_but_not_reduced(backend: str) -> None:
    case = Case(features=frozenset({"frozen_all"}))
    log = pool(2, backend).run(fsdp_runs.log_of_steps, case)[0][-1]
    assert [what for what, _, _ in log].count(REDUCE) == 4
    assert [what for what, _, _ in log].count(GATHER) == 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_weights_stay_until_the_gradient_has_passed_them(backend: str) -> None:
    case = Case(features=frozenset({"frozen_some"}))
    log = pool(2, backend).run(fsdp_runs.log_of_steps, case)[0][-1]
    # A block has a vector of frozen weights and one of trained ones.
    assert [what for what, _, _ in log].count(GATHER) == 1 + 2 * 3 + 1 + 2 * 3
    assert [what for what, _, _ in log].count(REDUCE) == 5


@pytest.mark.parametrize("feature", ["sometimes", "detached", "bypassed"])
def test_ranks_that_use_different_weights_run_the_same_collectives(feature: str) -> None:
    case = Case(features=frozenset({feature}), depth=5)
    by_rank = pool(3).run(fsdp_runs.log_of_steps, case)
    assert by_rank[0] == by_rank[1] == by_rank[2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("features", [(), ("checkpointed",), ("tied",), ("frozen_some",)])
def test_gathered_memory_is_bounded_and_given_back(
    features: tuple[str, ...], reshard: bool, backend: str
) -> None:
    case = Case(
        depth=6,
        hidden=40,
        features=frozenset(features),
        options={"reshard_after_forward": reshard, "compute_dtype": torch.float16},
    )
    sizes, peaks, rests = pool(2, backend).run(fsdp_runs.gathered_bytes, case)[0]
    assert rests == [0, 0, 0]
    if reshard:
        # The one in use, two ahead, and the last of the forward pass.
        per_unit = 2 if "frozen_some" in features else 1
        assert 0 < peaks[-1] <= sum(sorted(sizes)[-4 * per_unit :])
        assert peaks[-1] < sum(sizes)
    else:
        # The embedding's are not read again, unless they are the head's too.
        assert peaks[-1] == sum(sizes if "tied" in features else sizes[1:])
    assert peaks[1] == peaks[2]


SHAPES = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=5)


@given(SHAPES, st.integers(1, 5), st.sampled_from([torch.float16, torch.float32, torch.float64]))
@example([[0]], 2, torch.float32)
@example([[1], [1]], 4, torch.float16)
@settings(max_examples=200)
def test_pieces_of_all_ranks_make_up_every_weight(
    shapes: list[list[int]], world_size: int, dtype: torch.dtype
) -> None:
    layouts = [
        FlatLayout([torch.Size(shape) for shape in shapes], dtype, rank, world_size)
        for rank in range(world_size)
    ]
    whole = torch.zeros(layouts[0].padded_numel)
    weights, gaps = layouts[0].split(whole)
    for number, weight in enumerate(weights):
        weight.copy_(torch.arange(weight.numel()) + 1000 * (number + 1))
    assert sum(weight.numel() for weight in weights) + sum(gap.numel() for gap in gaps) == len(
        whole
    )
    for index, shape in enumerate(shapes):
        parts = [
            layout.piece(whole[rank * layout.shard_numel :][: layout.shard_numel], index)
            for rank, layout in enumerate(layouts)
        ]
        assert torch.equal(torch.cat(parts), weights[index])
        assert layouts[0].weight(whole, index).shape == torch.Size(shape)
        assert layouts[0].offsets[index] * dtype.itemsize % 16 == 0


def test_units_are_blocks_and_single_layers() -> None:
    features = frozenset({"bias", "nested", "outside", "tied", "lone_norm"})
    net = initial_net(Case(features=features))
    plans = plan_units(net)
    assert [plan.name for plan in plans] == [
        "embedding",
        "blocks.0.0",
        "blocks.1.rest.0",
        "blocks.1.rest.1",
        "outside.0",
        "outside.1",
    ]
    assert [len(plan.blocks) for plan in plans] == [0, 1, 1, 1, 0, 0]
    tied = plans[0]
    assert tied.roots == [net.embedding, net.head]
    assert [weight.names for weight in tied.weights] == [
        ["embedding.weight", "head.weight"],
        ["head.bias"],
    ]


def test_what_another_module_holds_too_is_replicated() -> None:
    net = nn.ModuleDict({"layer": nn.Linear(2, 2), "other": nn.ParameterList()})
    net["other"].append(net["layer"].weight)
    assert [weight.names for plan in plan_units(net) for weight in plan.weights] == [["layer.bias"]]


def test_attention_reads_its_layers_by_itself() -> None:
    (plan,) = plan_units(nn.Sequential(nn.MultiheadAttention(4, 2)))
    assert plan.name == "0"
    assert [weight.names for weight in plan.weights] == [["0.out_proj.weight"], ["0.out_proj.bias"]]


class Output:
    """What a model may return instead of a tensor."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
        self.name = "output"


def test_tensors_are_found_in_any_output() -> None:
    a, b, c, d = (torch.tensor(number) for number in range(4))
    found = list(tensors_in({"a": a, "rest": [(b, None, 3), Output(c)], "last": {"d": d}}))
    assert found == [a, b, c, d]
