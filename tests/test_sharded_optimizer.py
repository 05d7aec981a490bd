"""Is the sharded optimizer the plain one, with its state in parts and its errors on all ranks?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sharded_ranks as on_rank
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from ranks import pool
from sharded_ranks import NUM_STEPS, OPTIMIZERS, Case
from torch.testing import assert_close

from cs336_systems.errors import UsageError
from cs336_systems.parallel.launch import RankFailedError, run_on_ranks
from cs336_systems.parallel.ownership import assign_owners
from cs336_systems.parallel.sharded_optimizer import ShardedOptimizer

SHAPES = [(), (0,), (1,), (3, 5), (17,), (7, 15), (0, 4), (33,), (64, 8), (2, 3, 4)]
MIXED = Case(((7, 15), (0,), (17,), (), (64, 8), (1,)), groups=(1, 0, 2, 0, 1))
NONE_EMPTY = replace(MIXED, shapes=((7, 15), (9,), (17,), (), (64, 8), (1,)))
SQUARES = Case(((8, 8),) * 8)
BACKENDS = ["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, pytest.mark.multigpu(2)])]


def distributed(test: Any) -> Any:
    """Mark a test that starts ranks, which one process does for all of them."""
    return pytest.mark.distributed(pytest.mark.xdist_group("ranks")(test))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shapes = tuple(draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=7)))
    numbers = range(len(shapes))
    flags = st.frozensets(st.sampled_from(numbers), max_size=2)
    optimizers = ["sgd", "sgd_plain", "adam", "adam_foreach", "adamw", "basics_adamw"]
    return Case(
        shapes,
        optimizer=draw(st.sampled_from(optimizers)),
        dtypes=tuple(draw(st.sampled_from(["fp32", "fp64", "bf16"])) for _ in numbers),
        groups=tuple(draw(st.integers(0, 2)) for _ in numbers),
        without_gradient=draw(flags),
        frozen=draw(flags),
        scheduled=draw(st.booleans()),
        closure=draw(st.booleans()),
        overlap=draw(st.booleans()),
        num_late_groups=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 99)),
    )


@distributed
@given(cases(), st.integers(1, 4))
@example(Case(((5,),)), 4)
@example(Case(((0,), (0, 4))), 2)
@example(replace(MIXED, num_late_groups=2, overlap=True), 3)
@example(replace(MIXED, scheduled=True, closure=True), 2)
@example(replace(MIXED, dtypes=("complex", "fp64"), optimizer="adam"), 2)
def test_equals_the_plain_optimizer_bitwise(case: Case, world_size: int) -> None:
    check_case(case, world_size)


@distributed
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_and_ranks_that_own_nothing(optimizer: str, backend: str) -> None:
    # Torch's own Adafactor fails on empty parameters.
    case = NONE_EMPTY if optimizer == "adafactor" else MIXED
    results = check_case(replace(case, optimizer=optimizer), 2, backend)
    assert all(result["has_inner"] for result in results)
    if backend == "gloo":
        results = check_case(Case(((4, 3), (2,)), optimizer=optimizer), 3)
        assert [result["has_inner"] for result in results] == [True, True, False]


@distributed
@pytest.mark.parametrize("backend", BACKENDS)
def test_late_groups_are_as_good_as_early_ones(backend: str) -> None:
    early = check_case(MIXED, 2, backend)[0]
    late = check_case(replace(MIXED, num_late_groups=1), 2, backend)[0]
    # The last group's gradients count from the third step on, in the plain optimizer as well.
    assert not torch.equal(early["sharded"][-1][2], late["sharded"][-1][2])
    assert_close(late["sharded"][0][0], early["sharded"][0][0], rtol=0, atol=0)


def check_case(case: Case, world_size: int, backend: str = "gloo") -> list[dict[str, Any]]:
    """Train plain and sharded and compare, everywhere: every step, the state, its distribution."""
    results = pool(world_size, backend).run(on_rank.plain_and_sharded, case)
    for result in results:
        assert len(result["sharded"]) == NUM_STEPS
        for history in ("plain", "sharded"):
            assert_close(result[history], results[0]["plain"], rtol=0, atol=0)
        assert_same_state(result["state"], result["plain_state"])
    assert sum(result["state_bytes"] for result in results) == results[0]["plain_bytes"]
    assert {tuple(result["owners"]) for result in results} == {tuple(results[0]["owners"])}
    return results


def assert_same_state(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got["param_groups"] == expected["param_groups"]
    assert sorted(got["state"]) == sorted(expected["state"])
    for number, entry in expected["state"].items():
        assert list(got["state"][number]) == list(entry)
        for key, value in entry.items():
            other = got["state"][number][key]
            assert type(other) is type(value)
            if isinstance(value, torch.Tensor):
                assert_close(other, value, rtol=0, atol=0)
            else:
                assert other == value


@distributed
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adafactor"])
def test_equals_torch_zero(optimizer: str, backend: str) -> None:
    case = Case(((7, 15), (17,), (64, 8), (1,)), optimizer=optimizer, groups=(1, 0, 2, 0))
    results = pool(2, backend).run(on_rank.against_torch_zero, case)
    for theirs, ours, _, _ in results:
        assert_close(ours, theirs, rtol=0, atol=0)
    _, _, their_state, our_state = results[0]
    assert_close(our_state["state"], their_state["state"], rtol=0, atol=0)


@distributed
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "basics_adamw", "adafactor"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_state_saved_on_two_ranks_loads_on_any_number(optimizer: str, world_size: int) -> None:
    case = replace(NONE_EMPTY, optimizer=optimizer, without_gradient=frozenset({2}))
    plain = on_rank.make_run(case, sharded=False, device=torch.device("cpu"))
    expected = on_rank.train(plain, range(6))[-1]
    saved, nothing = pool(2).run(on_rank.save_after, case, 3, 0)
    assert nothing is None
    assert len(saved["optimizer"]["state"]) == len(plain.optimizer.state_dict()["state"])
    for got in pool(world_size).run(on_rank.load_and_train, case, saved, range(3, 6)):
        assert_close(got, expected, rtol=0, atol=0)
    unsharded = pool(1).run(on_rank.load_and_train, case, saved, range(3, 6), sharded=False)
    assert_close(unsharded[0], expected, rtol=0, atol=0)


@distributed
def test_all_ranks_can_have_the_state() -> None:
    first, *others = pool(3).run(on_rank.save_after, MIXED, 3, None)
    assert len(first["optimizer"]["state"]) == len(MIXED.shapes)
    for other in others:
        assert_same_state(other["optimizer"], first["optimizer"])


@distributed
def test_a_state_dict_is_a_snapshot() -> None:
    assert pool(2).run(on_rank.snapshot_survives_steps, SQUARES) == [True, True]


@given(
    st.lists(st.integers(0, 1000) | st.integers(0, 3), max_size=30),
    st.lists(st.integers(0, 500), min_size=1, max_size=9),
)
@example([5, 5, 4, 4, 3, 3, 3], [0, 0, 0])
def test_owners_are_balanced(sizes: list[int], loads: list[int]) -> None:
    owners = assign_owners(sizes, loads)
    assert owners == assign_owners(list(sizes), tuple(loads))
    totals = list(loads)
    for size, owner in zip(sizes, owners, strict=True):
        totals[owner] += size
    # Whoever got a size last held no more than the mean just before.
    mean = sum(totals) / len(totals)
    assert max(totals) <= max(max(loads), mean + max(sizes, default=0))
    if not any(loads):
        used = len({owner for size, owner in zip(sizes, owners, strict=True) if size})
        assert used == min(len(loads), sum(size > 0 for size in sizes))


def test_largest_first_meets_grahams_bound() -> None:
    sizes = [5, 5, 4, 4, 3, 3, 3]
    owners = assign_owners(sizes, [0, 0, 0])
    totals = [sum(s for s, o in zip(sizes, owners, strict=True) if o == rank) for rank in range(3)]
    # His worst case for three: 11 where 9 is possible, that is 4/3 - 1/9 of the best.
    assert max(totals) == 11


@distributed
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_state_is_spread_evenly(world_size: int) -> None:
    shapes = tuple((rows, 16) for rows in (50, 40, 30, 30, 20, 20, 10, 10, 5, 5, 2, 1))
    results = check_case(Case(shapes, optimizer="adamw"), world_size)
    total, largest = results[0]["plain_bytes"], 2 * 4 * 50 * 16
    assert total == 2 * 4 * 16 * sum(rows for rows, _ in shapes)
    for result in results:
        assert 0.9 * total / world_size <= result["state_bytes"] <= 1.1 * total / world_size
        assert result["state_bytes"] <= total / world_size + largest


@distributed
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_sends_one_message_per_owner_and_dtype(overlap: bool, backend: str) -> None:
    case = replace(SQUARES, dtypes=("fp32", "fp32", "bf16") * 2, overlap=overlap)
    for result in pool(2, backend).run(on_rank.collectives_of_steps, case):
        assert result["names"] == ["broadcast"] * 8
        # Squares fill 256 bytes in fp32 and half of that in bf16, which is padded.
        assert sum(result["bytes"]) == 2 * (6 * 256 + 2 * 256)
        assert result["stay"]
        assert result["aligned"]
        assert result["storages"] == 4


@distributed
def test_overlap_cuts_large_buffers_in_the_order_of_parameters() -> None:
    case = Case(((4096,),) * 6, optimizer="sgd_plain", overlap=True)
    for result in pool(2).run(on_rank.collectives_of_steps, case, chunk_bytes=25 * 1024):
        # 16 KiB each, of which no two fit into one message.
        assert result["bytes"] == [16 * 1024] * 12
        assert result["storages"] == 2


@distributed
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overlap", [False, True])
def test_memory_that_others_may_use_stays_theirs(overlap: bool, backend: str) -> None:
    case = replace(MIXED, overlap=overlap)
    assert pool(2, backend).run(on_rank.odd_memory, case) == [True, True]


@distributed
def test_edited_groups_and_hooks_work() -> None:
    for result in pool(3).run(on_rank.edits_and_hooks):
        assert result["hooks"] == ["before", "after"]
        assert result["values"] == [0.75, 0.75]


@distributed
def test_a_group_of_ranks() -> None:
    nothing, *results = pool(3).run(on_rank.on_a_part_of_the_ranks, MIXED, [1, 2])
    assert nothing is None
    for equal, owners in results:
        assert equal
        assert set(owners) == {0, 1}


@distributed
def test_autograd_sees_that_received_parameters_changed() -> None:
    assert min(pool(2).run(on_rank.version_after_step)) == 1


WHO = "ShardedOptimizer: "
REFUSED = {
    "empty": ("UsageError", "params must hold a parameter, got []"),
    "empty_group": ("UsageError", "params must hold a parameter, got [{'params': []}]"),
    "tensor": (
        "TypeError",
        "params must be an iterable of tensors or of dicts with params, got 'Parameter'",
    ),
    "number": (
        "TypeError",
        "params must be an iterable of tensors or of dicts with params, got 'int'",
    ),
    "set": ("TypeError", "params must be ordered, the same on every rank, got 'set'"),
    "strings": ("TypeError", "params must be tensors, got 'str'"),
    "no_params": ("TypeError", "param group must be a dict with params, got 'dict'"),
    "mixed_items": ("TypeError", "param group must be a dict with params, got 'Parameter'"),
    "not_leaf": ("UsageError", "params must be leaf tensors, got '(3,) with a grad_fn'"),
    "sparse": ("UsageError", "params must be dense, got 'torch.sparse_coo'"),
    "twice": (
        "UsageError",
        "params must be given once each, tied ones too, "
        "got 'number 1 of shape (3,), which is number 0 again'",
    ),
    "twice_in_groups": (
        "UsageError",
        "params must be given once each, tied ones too, "
        "got 'number 2 of shape (3,), which is number 0 again'",
    ),
    "same_memory": (
        "UsageError",
        "params must be given once each, tied ones too, "
        "got 'number 1 of shape (3,), which is number 0 again'",
    ),
    "add_known": (
        "UsageError",
        "params must be given once each, tied ones too, "
        "got 'number 1 of shape (3,), which is number 0 again'",
    ),
    "add_twice": (
        "UsageError",
        "params must be given once each, tied ones too, "
        "got 'number 2 of shape (3,), which is number 1 again'",
    ),
    "add_list": ("TypeError", "param group must be a dict with params, got 'list'"),
    "load_groups": ("UsageError", "state_dict must have groups of [2] parameters, got []"),
    "load_sizes": ("UsageError", "state_dict must have groups of [2] parameters, got [1]"),
    "load_foreign": (
        "UsageError",
        "state_dict must hold state of its groups' parameters alone, got 'state of parameter 7'",
    ),
    "consolidate_to": ("UsageError", "to must be None or a rank below 2, got 9"),
    "popped_group": (
        "UsageError",
        "number of param_groups must be 2 as added by add_param_group, got 1",
    ),
}


@distributed
@pytest.mark.parametrize("kind", REFUSED)
def test_misuse_is_refused_on_all_ranks_alike(kind: str) -> None:
    name, text = REFUSED[kind]
    assert pool(2).run(on_rank.error_of, kind) == [(name, WHO + text)] * 2


@distributed
@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("load_list", "UsageError", "state_dict must be a dict with state and param_groups, got ["),
        ("hyperparameter", "ValueError", "learning rate"),
        ("unknown_option", "TypeError", "learning_rate"),
        ("changed_dtype", "UsageError", "must keep the shape, dtype and device they had"),
        ("unconsolidated", "RuntimeError", "must come after consolidate_state_dict(to="),
        ("stale", "RuntimeError", "must come after consolidate_state_dict(to="),
    ],
)
def test_misuse_is_explained(kind: str, name: str, words: str) -> None:
    for got_name, got_text in pool(2).run(on_rank.error_of, kind):
        assert got_name == name
        assert words in got_text


@distributed
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("one_empty", "rank 1 was refused: ShardedOptimizer: params must hold a parameter"),
        ("one_hyperparameter", "rank 1 was refused: Invalid learning rate: -1.0"),
        ("one_shape", "got 'group 0 parameter 1 (3,) float32 trainable' on rank 0 and "),
        ("one_dtype", "group 0 parameter 0 (3,) float16 trainable' on rank 1"),
        (
            "one_more",
            "got 'nothing more' on rank 0 and 'group 0 parameter 1 (3,) float32 trainable'",
        ),
        ("one_key", "momentum, name, nesterov, weight_decay' on rank 1"),
        ("one_adds", "group 0 parameter 0 (4,) float32 trainable' on rank 1"),
        ("one_loads", "rank 1 was refused: ShardedOptimizer: state_dict must have groups of"),
    ],
)
def test_a_fault_of_one_rank_is_raised_on_all(kind: str, words: str) -> None:
    first, last = pool(2).run(on_rank.error_of, kind)
    assert first[0] == "UsageError"
    assert words in first[1]
    # The culprit sees its own error, which the others quote.
    assert last == first or last[1] in first[1]


@distributed
def test_a_refused_group_leaves_no_trace() -> None:
    assert pool(2).run(on_rank.usable_after_refused_group) == [[1, 1]] * 2


@distributed
def test_a_rank_that_fails_in_a_step_is_named() -> None:
    with pytest.raises(RankFailedError) as caught:
        run_on_ranks(on_rank.step_that_fails_on, 2, 1, timeout_s=20)
    assert caught.value.rank == 1
    assert "unexpected keyword argument 'unknown'" in caught.value.traceback
    assert "ShardedOptimizer: raised on rank 1, for which the other ranks" in caught.value.traceback


def test_needs_a_process_group() -> None:
    with pytest.raises(UsageError, match="process group must be initialised"):
        ShardedOptimizer([torch.nn.Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1)
