"""The all-reduce benchmark: times taken on ranks, the check before them, choices, rows."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import all_reduce_cases
import pytest
import timing_ranks
import torch
from all_reduce_cases import Exchange, default_grid
from all_reduce_ranks import RankResult, all_reduce_rounds, random_terms
from bench_all_reduce import replayed
from hypothesis import given
from hypothesis import strategies as st
from parallel_fixtures import ON_RANKS
from rank_slot import RankSlot
from ranks import pool
from test_benchmarks import run, selected

from cs336_systems.errors import UsageError
from cs336_systems.measure.harness import Harness, Settings
from cs336_systems.measure.ranks import slowest
from cs336_systems.measure.workload import NotMeasured, Workload
from cs336_systems.parallel.collectives import Collective
from cs336_systems.parallel.launch import RankFailedError

CPU = torch.device("cpu")


@given(st.integers(1, 5), st.integers(0, 5), st.randoms(use_true_random=False))
def test_slowest_is_the_largest_of_each_round(ranks: int, rounds: int, random: Any) -> None:
    by_rank = [[random.random() for _ in range(rounds)] for _ in range(ranks)]
    expected = torch.tensor(by_rank, dtype=torch.float64).reshape(ranks, rounds).amax(0)
    assert slowest(by_rank) == expected.tolist()


def test_slowest_refuses_ranks_that_disagree() -> None:
    with pytest.raises(UsageError, match=r"have timed equally many rounds, got \[2, 1\]"):
        slowest([[1.0, 2.0], [1.0]])


class TestTimesOfRanks:
    """What a rank measures, and what all ranks do alike."""

    pytestmark = ON_RANKS

    def test_each_rank_takes_its_own_time_after_setup(self) -> None:
        found = pool(2).run(timing_ranks.timed_sleeps, (0.0, 0.03), 4, 2, 9.0)
        (quick, calls), (slow, _) = found
        assert calls == ["setup", "step"] * 6
        assert len(quick) == len(slow) == 4
        assert min(slow) >= 0.03
        assert median(quick) < 0.03
        assert slowest([quick, slow]) == slow

    def test_rounds_end_early_on_all_ranks_when_one_is_slow(self) -> None:
        found = pool(2).run(timing_ranks.timed_sleeps, (0.0, 0.02), 50, 1, 0.09)
        counts = {len(seconds) for seconds, _ in found}
        assert counts == {len(found[1][0])}
        assert 3 <= counts.pop() <= 4

    def test_no_rank_begins_before_all_are_ready(self) -> None:
        first, second = pool(2).run(timing_ranks.late_setup, 0.05)
        assert median(slowest([first, second])) < 0.05

    def test_all_reduce_is_checked_and_recorded(self) -> None:
        results = pool(2).run(all_reduce_rounds, 4000, 3, 1, 9.0)
        for result in results:
            assert len(result.seconds) == 3
            assert min(result.seconds) > 0
            assert result.call == Collective("all_reduce", 1000, torch.float32, 4000, 2)
            assert result.device_name

    @pytest.mark.parametrize("rank", [0, 1])
    def test_wrong_sum_fails(self, rank: int) -> None:
        with pytest.raises(RankFailedError, match="all-reduce: the sum is wrong") as failure:
            pool(2).run(timing_ranks.spoiled_sum, rank)
        assert failure.value.rank == rank

    def test_slot_keeps_ranks_of_one_kind(self) -> None:
        slot = RankSlot()
        first = slot.get(1, "gloo")
        assert slot.get(1, "gloo") is first
        assert slot.get(2, "gloo").world_size == 2
        slot.clear()


def test_terms_are_random_and_sums_exact() -> None:
    terms = random_terms(1000, CPU)
    assert torch.equal(terms, random_terms(1000, CPU))
    assert len(terms.unique()) == 17
    assert torch.equal(terms, terms.round())


def test_ranks_become_one_workload() -> None:
    call = Collective("all_reduce", 10**9, torch.float32, 4 * 10**9, 4)
    results = [
        RankResult([1.0, 4.0, 2.0], "A", call),
        RankResult([3.0, 1.0, 2.0], "A", call),
        *(RankResult([0.5] * 3, "B", call) for _ in range(2)),
    ]
    workload = replayed(Exchange("gloo", 4, 4000), results)
    assert workload.replay_seconds == [3.0, 4.0, 2.0]
    assert workload.metrics is not None
    assert workload.metrics() == {
        "algorithm_gb_per_s": pytest.approx(4 / 3),
        "bus_gb_per_s": pytest.approx(4 / 3 * 2 * 3 / 4),
    }
    assert workload.count is not None
    assert workload.count() == {"message_bytes": 4 * 10**9, "wire_bytes": 6 * 10**9}
    assert workload.facts == {"devices": "2 x A, 2 x B"}


def test_counts_of_replayed_times_are_recorded() -> None:
    workload = Workload(step=lambda: None, replay_seconds=[1.0], count=lambda: {"message_bytes": 4})
    harness = Harness(Settings(device=CPU))
    record = harness.run(
        Exchange("gloo", 2, 1).case(), lambda: workload, lambda clock, step, setup, rounds: None
    )
    assert record.counts == {"message_bytes": 4}


def test_missing_devices_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(all_reduce_cases, "available_bytes", lambda _: None)
    with pytest.raises(NotMeasured) as end:
        Exchange("nccl", 6, 1).refuse_what_cannot_run()
    assert (end.value.status, end.value.reason) == (
        "skipped",
        "nccl: needs 6 CUDA devices, found 1",
    )
    Exchange("nccl", 1, 1).refuse_what_cannot_run()
    Exchange("gloo", 6, 1).refuse_what_cannot_run()


def test_missing_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(all_reduce_cases, "available_bytes", lambda _: 7 * 10**9)
    # Ranks of gloo share one memory.
    Exchange("nccl", 6, 1000).refuse_what_cannot_run()
    Exchange("gloo", 2, 1000).refuse_what_cannot_run()
    with pytest.raises(NotMeasured) as end:
        Exchange("gloo", 6, 1000).refuse_what_cannot_run()
    assert end.value.status == "oom"
    assert end.value.reason == "predicted: needs at least 16.76 GiB, there are 6.52 GiB"


def test_grid_is_the_handouts_on_a_gpu_and_seconds_without() -> None:
    full = default_grid(torch.device("cuda"), smoke=False)
    assert full.exchanges() == [
        Exchange(backend, processes, megabytes)
        for backend in ("gloo", "nccl")
        for processes in (2, 4, 6)
        for megabytes in (1, 10, 100, 1000)
    ]
    for smoke in (False, True):
        small = default_grid(CPU, smoke=smoke)
        assert small.processes == (2,)
        assert max(small.megabytes) <= 100


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--backends=mpi", "--backends must be one of gloo, nccl, got 'mpi'"),
        ("--processes=0", "--processes must list integers of at least 1, got '0'"),
        ("--megabytes=1.5", "--megabytes must list integers of at least 1, got '1.5'"),
    ],
)
def test_wrong_choices_are_one_line(option: str, message: str) -> None:
    result = run(option)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_choices_select_cases() -> None:
    cases = selected("--backends=gloo", "--processes=3,2", "--megabytes=5", "-k", "all_reduce")
    assert [case.split("::")[1] for case in cases] == [
        "bench_all_reduce[gloo-3-5]",
        "bench_all_reduce[gloo-2-5]",
    ]


@pytest.mark.distributed
def test_smoke_measures_and_gives_reasons(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    result = run("--smoke", "-k", "all_reduce", f"--benchmark-json={output}")
    assert result.returncode == 0, result.stdout + result.stderr
    data: dict[str, Any] = json.loads(output.read_text())
    (timed,) = [entry for entry in data["benchmarks"] if entry["params"]["backend"] == "gloo"]
    record, seconds = timed["extra_info"], timed["stats"]["median"]
    assert record["case"] == {"backend": "gloo", "processes": 2, "megabytes": 1}
    assert record["counts"] == {"message_bytes": 10**6, "wire_bytes": 10**6}
    assert record["warmup_rounds"] == 5
    assert record["facts"]["devices"].startswith("2 x ")
    assert record["metrics"]["bus_gb_per_s"] == pytest.approx(1e-3 / seconds)
    if torch.cuda.device_count() < 2:
        (row,) = data["cs336_systems"]["rows"]
        assert row["status"] == "skipped"
        assert row["reason"].startswith("nccl: needs 2 CUDA devices, found ")
