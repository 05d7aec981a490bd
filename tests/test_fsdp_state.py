"""States of sharded models: those of plain ones, whatever number of ranks saves and loads them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import fsdp_runs
import pytest
import torch
import torch.distributed.checkpoint as dcp
from fsdp_models import OPTIMIZERS, Case, initial_net, same_bits, start, train_step
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parallel_fixtures import BACKENDS, ON_RANKS
from ranks import pool
from torch import Tensor

from cs336_systems.parallel.fsdp_state import rectangles

pytestmark = ON_RANKS
FULL = frozenset({"bias", "tied", "outside", "frozen_some", "lone_norm"})


def full_state(case: Case) -> dict[str, Tensor]:
    return start(case)[0].full_state_dict()


@settings(max_examples=10)
@given(
    world_size=st.integers(1, 4),
    width=st.integers(1, 9),
    features=st.frozensets(st.sampled_from(sorted(FULL))),
    dtype=st.sampled_from([None, torch.float16]),
)
@example(world_size=3, width=5, features=FULL, dtype=torch.bfloat16)
def test_full_state_is_the_plain_modules(
    world_size: int, width: int, features: frozenset[str], dtype: torch.dtype | None
) -> None:
    case = Case(width=width, features=features, options={"compute_dtype": dtype})
    net = initial_net(case)
    for state in pool(world_size).run(full_state, case):
        assert same_bits(state, net.state_dict())
        net.load_state_dict(state)


def train_and_save(case: Case, folder: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train two steps; return the whole states, and write a distributed checkpoint."""
    model, optimizer, _ = start(case)
    for step in range(2):
        train_step(case, model, optimizer, step)
    if folder is not None:
        dcp.save(model.sharded_state_dict(), checkpoint_id=folder)
    return dict(model.full_state_dict()), model.full_optimizer_state_dict(optimizer)


def load_and_train(case: Case, state: dict[str, Any], optimizer_state: dict[str, Any]) -> Any:
    """Load whole states into another model, and train one step more."""
    model, optimizer, _ = start(case)
    train_step(case, model, optimizer, 9)
    model.load_full_state_dict(state)
    model.load_full_optimizer_state_dict(optimizer, optimizer_state)
    loaded = dict(model.full_state_dict()), model.full_optimizer_state_dict(optimizer)
    train_step(case, model, optimizer, 2)
    return loaded, dict(model.full_state_dict())


def load_checkpoint(case: Case, folder: str) -> dict[str, Tensor]:
    model, optimizer, _ = start(case)
    train_step(case, model, optimizer, 9)
    dcp.load(model.sharded_state_dict(), checkpoint_id=folder)
    return model.full_state_dict()


def load_into_plain(case: Case, folder: str) -> dict[str, Tensor]:
    state = initial_net(case).state_dict()
    dcp.load(state, checkpoint_id=folder)
    return state


def flat_state(state: dict[str, Any]) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": torch.as_tensor(value)
        for number, values in state["state"].items()
        for name, value in values.items()
        if value is not None
    }


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("world_size", [1, 3])
def test_whole_states_move_between_world_sizes(world_size: int, optimizer: str) -> None:
    case = Case(features=FULL, optimizer=optimizer)
    states, optimizer_states = pool(2).run(train_and_save, case, None)[0]
    for loaded, _ in pool(world_size).run(load_and_train, case, states, optimizer_states):
        assert same_bits(loaded[0], states)
        assert same_bits(flat_state(loaded[1]), flat_state(optimizer_states))
        assert loaded[1]["param_groups"] == optimizer_states["param_groups"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", ["momentum", "basics_adamw"])
def test_training_goes_on_bit_for_bit(optimizer: str, backend: str) -> None:
    case = Case(features=FULL, optimizer=optimizer)
    states = pool(2, backend).run(train_and_save, case, None)[0]
    wanted = pool(2, backend).run(fsdp_runs.train_steps, case, 3)[0]
    for _, state in pool(2, backend).run(load_and_train, case, *states):
        assert same_bits(state, wanted)


def test_whole_states_are_those_of_plain_training() -> None:
    """Names, numbers and shapes: a plain optimizer loads them."""
    case = Case(features=FULL, optimizer="adamw")
    state, optimizer_state = pool(3).run(train_and_save, case, None)[0]
    net = initial_net(case)
    net.load_state_dict(state)
    parameters = [p for p in net.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(parameters)
    plain.load_state_dict(optimizer_state)
    for parameter in parameters:
        assert plain.state[parameter]["exp_avg"].shape == parameter.shape
        assert plain.state[parameter]["step"] == 2


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_distributed_checkpoints_move_between_world_sizes(tmp_path: Path, world_size: int) -> None:
    case = Case(features=FULL, width=7)
    folder = str(tmp_path / "checkpoint")
    state, _ = pool(2).run(train_and_save, case, folder)[0]
    for loaded in pool(world_size).run(load_checkpoint, case, folder):
        assert same_bits(loaded, state)


def test_distributed_checkpoints_hold_the_plain_modules_tensors(tmp_path: Path) -> None:
    case = Case(features=FULL, width=7)
    state, _ = pool(3).run(train_and_save, case, str(tmp_path))[0]
    (plain,) = pool(1).run(load_into_plain, case, str(tmp_path))
    assert same_bits(plain, state)


@pytest.mark.parametrize("world_size", [2, 3])
def test_padding_stays_what_it_was(world_size: int) -> None:
    case = Case(width=3, hidden=5, optimizer="adamw", features=frozenset({"bias"}))
    for found in pool(world_size).run(fsdp_runs.gaps_of_shards, case):
        assert found
        assert set(found) == {0.0}


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
@settings(max_examples=200)
def test_rectangles_make_up_a_run(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start_at = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start_at, numel))
    whole = torch.arange(numel).view(shape)
    found = []
    for offsets, sizes in rectangles(start_at, stop, shape):
        part = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
        assert part.shape == torch.Size(sizes)
        found += part.flatten().tolist()
    assert found == list(range(start_at, stop))
    assert len(list(rectangles(start_at, stop, shape))) <= 2 * len(shape)
