"""Case selection from the command line, and the one model that is alive at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cases import Selection, add_options, selection
from host_turns import HostTurns
from model_bench import ModelSlot
from pace import Pace
from rank_slot import RankSlot


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    # Checked before anything is collected, so that a wrong value costs nothing.
    config.stash[SELECTION] = selection(config)


SELECTION = pytest.StashKey[Selection]()
NOTHING = "nothing"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Let each benchmark file's `sweep(selection)` give the values of its parameters, in order."""
    sweep = getattr(metafunc.module, "SWEEPS", {}).get(metafunc.function.__name__)
    if sweep is not None:
        names, values = sweep(metafunc.config.stash[SELECTION])
        width = names.count(",") + 1
        metafunc.parametrize(names, values or [NOTHING if width == 1 else (NOTHING,) * width])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the functions that this run sweeps nothing of; a library's warning stays a warning."""
    empty = [
        item
        for item in items
        if NOTHING in item.callspec.params.values()  # type: ignore[attr-defined]
    ]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if item not in empty]
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:`torch.jit.script_method`"))
        item.add_marker(pytest.mark.filterwarnings("default"))
        item.add_marker(pytest.mark.timeout(0))


@pytest.fixture(scope="session")
def chosen(request: pytest.FixtureRequest) -> Selection:
    """Return what this run sweeps."""
    return request.config.stash[SELECTION]


@pytest.fixture(scope="session")
def model_slot() -> Iterator[ModelSlot]:
    """Return the place of the model that consecutive cases share."""
    slot = ModelSlot()
    yield slot
    slot.clear()


@pytest.fixture(scope="session")
def rank_slot() -> Iterator[RankSlot]:
    """Return the place of the ranks that consecutive cases share."""
    slot = RankSlot()
    yield slot
    slot.clear()


@pytest.fixture(scope="session")
def host_turns() -> HostTurns:
    """Return the rounds that consecutive cases share."""
    return HostTurns()


@pytest.fixture(scope="session")
def pace() -> Pace:
    """Return what the cases of a sweep tell those after them."""
    return Pace()
