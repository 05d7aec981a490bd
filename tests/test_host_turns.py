"""Rows that take turns: who is called when, what a round's time is, and one row's failure."""

from __future__ import annotations

from collections.abc import Callable

import host_turns
import pytest
import torch
from attention_bench import Shape
from flash_cases import Point
from host_turns import HostTurns, take_turns

from cs336_systems.errors import UsageError
from cs336_systems.measure.harness import Settings
from cs336_systems.measure.workload import NotMeasured, Workload

POINT = Point("quick", "fp32", Shape(1, 1, 64, 32), "forward")
SETTINGS = Settings(device=torch.device("cpu"), warmup_rounds=1)


class Host:
    """A host whose time passes in calls alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr("cs336_systems.measure.clock.time.perf_counter", lambda: self.now)

    def step(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            self.now += seconds

        return call


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def turns(host: Host, **how: float) -> dict[str, list[float]]:
    workloads = {
        name: Workload(step=host.step(name, seconds))
        for name, seconds in (("quick", 1.0), ("slow", 3.0))
    }
    settings = {"rounds": 4, "warmup_rounds": 1, "calls": 2, "max_seconds": 1e3, **how}
    return take_turns(workloads, lambda: None, **settings)  # type: ignore[arg-type]


def test_rows_take_turns_whose_order_turns_around(host: Host) -> None:
    taken = turns(host)
    forwards, backwards = ["quick"] * 2 + ["slow"] * 2, ["slow"] * 2 + ["quick"] * 2
    assert host.calls == backwards + (forwards + backwards) * 2
    assert taken == {"quick": [1.0] * 4, "slow": [3.0] * 4}


def test_a_slow_minute_is_every_rows(host: Host) -> None:
    """Times that double halfway through leave the ratio as it was in every round."""
    steps = {"quick": host.step("quick", 1.0), "slow": host.step("slow", 3.0)}

    def slower(step: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            begun = host.now
            step()
            if len(host.calls) > 8:
                host.now += host.now - begun

        return call

    taken = take_turns(
        {name: Workload(step=slower(step)) for name, step in steps.items()},
        lambda: None, rounds=6, warmup_rounds=0, calls=2, max_seconds=1e3,
    )  # fmt: skip
    assert taken["quick"] == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    assert taken["slow"] == [3 * seconds for seconds in taken["quick"]]


@pytest.mark.parametrize(("max_seconds", "rounds"), [(1e3, 40), (16.0, 5), (0.1, 3)])
def test_the_budget_is_of_all_rows(host: Host, max_seconds: float, rounds: int) -> None:
    """A round takes 8 seconds, 2 of one row and 6 of the other; the budget is twice a row's."""
    taken = turns(host, rounds=40, max_seconds=max_seconds)
    assert {len(seconds) for seconds in taken.values()} == {rounds}


def test_every_row_is_built_once_and_ends_by_itself() -> None:
    built: list[str] = []
    called: list[str] = []

    def fail() -> None:
        raise AssertionError("o: max error 1 in fp64, budget 0")

    def build(point: Point) -> Workload:
        built.append(point.attention)
        if point.attention == "absent":
            raise NotMeasured("skipped", "absent: needs a CUDA device")
        check = fail if point.attention == "wrong" else None
        return Workload(step=lambda: called.append(point.attention), check=check)

    rows = ("quick", "absent", "wrong")
    shared = HostTurns()

    def ask(row: str, which: str = "forward") -> Workload:
        point = POINT._replace(attention=row, which=which)
        return shared.workload(point, rows, build, SETTINGS, rounds=3, calls=2)

    assert len(ask("quick").replay_seconds or ()) == 3
    with pytest.raises(NotMeasured, match="needs a CUDA device"):
        ask("absent")
    with pytest.raises(AssertionError, match="max error 1"):
        ask("wrong")
    assert built == list(rows)
    assert set(called) == {"quick"}
    metrics = ask("quick").metrics
    assert metrics is not None
    assert "peak_bytes" in metrics()
    ask("quick", "forward_backward")
    assert built == 2 * list(rows)


def test_an_error_between_rounds_leaves_nothing_of_another_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = HostTurns()

    def ask(which: str) -> Workload:
        return shared.workload(
            POINT._replace(which=which), ("quick",), lambda _: Workload(step=lambda: None),
            SETTINGS, rounds=3, calls=1,
        )  # fmt: skip

    ask("forward")

    def interrupted(*_: object, **__: object) -> dict[str, list[float]]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(host_turns, "take_turns", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask("forward_backward")
    assert ask("forward_backward").replay_seconds


def test_a_setup_has_no_place_between_calls() -> None:
    workload = Workload(step=lambda: None, setup=lambda: None)
    with pytest.raises(UsageError, match="calls_per_round must be 1 with a setup, got 2"):
        take_turns(
            {"x": workload}, lambda: None, rounds=3, warmup_rounds=0, calls=2, max_seconds=1.0
        )
