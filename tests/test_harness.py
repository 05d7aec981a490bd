"""The harness: what happens around the timed rounds, and how a case ends that has none."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cs336_systems.errors import UsageError
from cs336_systems.measure.harness import Harness, Settings
from cs336_systems.measure.memory import is_out_of_memory, requested_bytes, saved_bytes
from cs336_systems.measure.record import SCHEMA, Case, Record
from cs336_systems.measure.workload import NotMeasured, Workload

CPU = torch.device("cpu")
CASE = Case(study="study", params={"n": 1}, rounds=4, warmup_rounds=2)


class Log(list[str]):
    """What was called, in order."""

    def call(self, name: str) -> Callable[[], None]:
        return lambda: self.append(name)


def timer(clock: Callable[[], float], step: Callable, setup: Callable | None, rounds: int) -> None:  # type: ignore[type-arg]
    """Stand in for pytest-benchmark's pedantic mode."""
    for _ in range(rounds):
        if setup is not None:
            setup()
        clock()
        step()
        clock()


def run(case: Case, build: Callable[[], Workload], **settings: float) -> Record:
    return Harness(Settings(device=CPU, **settings)).run(case, build, timer)  # type: ignore[arg-type]


def test_order_of_a_case() -> None:
    log = Log()
    workload = Workload(
        step=log.call("step"),
        setup=log.call("setup"),
        check=log.call("check"),
        count=lambda: {"k": 1},
    )
    record = run(CASE, lambda: workload)
    warm_up = ["setup", "step"] * 2
    memory_round = ["setup", "step"]
    assert log == [*warm_up, "check", *memory_round, *["setup", "step"] * 4]
    assert (record.status, record.counts, record.case.rounds) == ("ok", {"k": 1}, 4)


def test_command_line_rounds_hold_where_the_case_has_none() -> None:
    record = run(
        Case(study="s", params={}), lambda: Workload(step=lambda: None), rounds=7, warmup_rounds=0
    )
    assert (record.case.rounds, record.case.warmup_rounds) == (7, 0)


def test_slow_case_runs_three_rounds() -> None:
    record = run(CASE, lambda: Workload(step=lambda: time.sleep(0.02)), max_seconds=0.001)
    assert record.case.rounds == 3


def test_round_of_several_calls_takes_the_time_of_one() -> None:
    log, times = Log(), []

    def read(clock: Callable[[], float], step: Callable, setup: None, rounds: int) -> None:  # type: ignore[type-arg]
        assert setup is None
        for _ in range(rounds):
            start = clock()
            step()
            times.append(clock() - start)

    def step() -> None:
        log.append("step")
        time.sleep(0.002)

    case = replace(CASE, calls_per_round=5)
    record = Harness(Settings(device=CPU)).run(case, lambda: Workload(step=step), read)
    warm_up, memory = 2 * 5, 1
    assert len(log) == warm_up + memory + 4 * 5
    assert record.to_json()["calls_per_round"] == 5
    # Asleep 2 ms at the least a call; ten would mean that a round was not divided.
    assert 0.002 <= min(times) < 0.01


def test_round_of_several_calls_has_no_setup_between_them() -> None:
    workload = Workload(step=lambda: None, setup=lambda: None)
    with pytest.raises(UsageError, match="calls_per_round must be 1 with a setup, got 2"):
        run(replace(CASE, calls_per_round=2), lambda: workload)


def test_wrong_result_is_not_timed() -> None:
    log = Log()

    def check() -> None:
        raise AssertionError("wrong by 2")

    with pytest.raises(AssertionError, match="wrong by 2"):
        Harness(Settings(device=CPU)).run(
            CASE, lambda: Workload(step=lambda: None, check=check), lambda *_: log.append("timed")
        )
    assert log == []


def test_running_out_of_memory_is_a_row() -> None:
    def build() -> Workload:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."
        )

    record = run(CASE, build)
    assert record.status == "oom"
    assert record.metrics == {"requested_bytes": 2.5 * 2**30}
    assert "2.50 GiB" in str(record.reason)


def test_a_real_failed_allocation_is_a_row() -> None:
    record = run(CASE, lambda: Workload(step=lambda: torch.empty(2**60, dtype=torch.uint8)))
    assert record.status == "oom"
    assert record.metrics["requested_bytes"] == 2**60


def test_another_error_is_an_error() -> None:
    def build() -> Workload:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        run(CASE, build)


def test_what_cannot_be_measured_is_a_row() -> None:
    def build() -> Workload:
        raise NotMeasured("not_installed", "package x is not installed")

    record = run(CASE, build)
    assert (record.status, record.reason) == ("not_installed", "package x is not installed")


def test_replayed_times_run_nothing() -> None:
    times: list[float] = []

    def read(clock: Callable[[], float], step: Callable, setup: None, rounds: int) -> None:  # type: ignore[type-arg]
        for _ in range(rounds):
            start = clock()
            step()
            times.append(clock() - start)

    def step() -> None:
        raise AssertionError("a replayed step must not run")

    workload = Workload(step=step, replay_seconds=[1.0, 2.0, 4.0])
    record = Harness(Settings(device=CPU)).run(CASE, lambda: workload, read)
    assert times == [1.0, 2.0, 4.0]
    assert record.case.rounds == 3


def test_gpu_clock_and_flushed_cache_are_the_hosts_on_a_cpu() -> None:
    case = Case(study="s", params={}, clock="gpu_ms", cache="cold")
    record = run(case, lambda: Workload(step=lambda: None))
    assert (record.case.clock, record.case.cache) == ("wall_ms", "warm")


@pytest.mark.gpu
def test_with_a_cold_cache_the_device_is_busy_while_the_host_launches() -> None:
    times = []

    def read(clock: Callable[[], float], step: Callable, setup: Callable, rounds: int) -> None:  # type: ignore[type-arg]
        for _ in range(rounds):
            setup()
            start = clock()
            step()
            times.append(clock() - start)

    one = torch.zeros(1, device="cuda")

    def step() -> None:
        time.sleep(2e-4)
        one.add_(1)

    case = replace(CASE, clock="gpu_ms", cache="cold")
    Harness(Settings(device=one.device)).run(case, lambda: Workload(step=step), read)
    assert sorted(times)[len(times) // 2] < 1e-4


def test_record_is_flat_json() -> None:
    record = Record(case=CASE, device="cpu", metrics={"peak_bytes": None})
    data = record.to_json()
    assert data["schema"] == SCHEMA
    assert data["case"] == {"n": 1}
    assert data["study"] == "study"
    assert data["metrics"] == {"peak_bytes": None}
    assert "params" not in data


def test_saved_bytes_counts_each_storage_once_and_no_parameter() -> None:
    weight = torch.randn(16, 16, requires_grad=True)
    x = torch.randn(8, 16, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x @ weight  # Saves x and weight.
        return y * y  # Saves y twice.

    expected = 8 * 16 * 4 * 2  # x and y
    assert saved_bytes(forward, [weight]) == expected
    assert saved_bytes(forward) == expected + weight.nbytes


def test_saved_bytes_leaves_out_what_is_gone_before_backward() -> None:
    x = torch.randn(8, requires_grad=True)

    def forward() -> torch.Tensor:
        x.exp()  # Saves its output, in a graph that nothing holds.
        return x.sigmoid()

    assert saved_bytes(forward) == x.nbytes


def test_backward_works_on_what_was_counted() -> None:
    x = torch.randn(8, requires_grad=True)
    results: list[torch.Tensor] = []
    saved_bytes(lambda: results.append(x.exp().sum()))
    results[0].backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, x.detach().exp())


def test_saved_bytes_frees_the_graph() -> None:
    """A node that saves its own output (exp) once kept itself alive and the whole model with it."""
    x = torch.randn(8, requires_grad=True)
    graph: list[weakref.ref[torch.Tensor]] = []

    def forward() -> torch.Tensor:
        y = x.exp()
        graph.append(weakref.ref(y))
        return y.sum()

    assert saved_bytes(forward) == x.nbytes
    gc.collect()
    assert graph[0]() is None


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0", 20 * 2**20),
        ("CUDA out of memory. Tried to allocate 512 bytes.", 512),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes. Error", 123),
        ("out of memory", None),
    ],
)
def test_requested_bytes(message: str, expected: int | None) -> None:
    assert requested_bytes(RuntimeError(message)) == expected


def test_only_memory_errors_are_memory_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert not is_out_of_memory(RuntimeError("x"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
