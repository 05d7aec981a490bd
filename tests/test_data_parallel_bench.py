"""The data-parallel benchmark: choices, predictions, what ranks found as one row, a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_data_parallel
import data_parallel_cases
import pytest
import torch
from bench_data_parallel import replayed
from data_parallel_cases import SCALED, TrainingCase, chosen_trainings, default_trainings
from data_parallel_ranks import LinkTimes, Phase, TrainingResult, train_rounds
from data_parallel_rows import KINDS, bucket_prediction, communication_prediction
from parallel_fixtures import ON_RANKS
from ranks import pool
from test_benchmarks import run, selected

from cs336_systems.errors import UsageError
from cs336_systems.measure.intervals import unpack
from cs336_systems.measure.timeline import Timeline
from cs336_systems.measure.workload import NotMeasured
from cs336_systems.parallel import STRATEGIES
from cs336_systems.parallel.collectives import Collective
from cs336_systems.parallel.launch import RankFailedError
from cs336_systems.parallel.rank_process import Failure

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HOW = {"rounds": 3, "warmup_rounds": 2, "steps_per_round": 2, "max_seconds": 1.0}


def case_of(strategy: str, **changes: Any) -> TrainingCase:
    case = TrainingCase(strategy, "debug", 16, 2, 2, "fp32", "fp32")
    return case._replace(**changes)


# --- choices ---


def test_grid_is_the_handouts_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    full = default_trainings(GPU, smoke=False)
    assert [case.strategy for case in full.cases()] == [*STRATEGIES] * 4
    assert {case[1:7] for case in full.cases()} == {
        ("xl", 512, batch, ranks, "bf16", "fp32") for batch in (2, 24) for ranks in (2, 4)
    }
    swept = [case.bucket_mb for case in full.bucket_cases() if case.strategy == "flashddp"]
    assert swept == [1, 10, 100, 250, 500, 1000] * 2
    assert {case.batch for case in full.bucket_cases()} == {24}


def test_scaling_starts_from_one_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    full = default_trainings(GPU, smoke=False)
    assert full.ranks == (2, 4)
    cases = full.scaling_cases()
    batches = {(case.scaling, case.ranks): case.batch for case in cases}
    assert batches == {
        ("weak", 1): 24, ("strong", 1): 24,
        ("weak", 2): 24, ("strong", 2): 12,
        ("weak", 4): 24, ("strong", 4): 6,
    }  # fmt: skip
    for ranks in (1, 2, 4):
        found = [case.strategy for case in cases if (case.scaling, case.ranks) == ("weak", ranks)]
        assert found == ["none"] if ranks == 1 else [*SCALED]


def test_ranks_that_do_not_divide_the_batch_do_not_scale_strongly() -> None:
    given = {"ranks": "2,3", "rank_batch": "8", "strategies": "zero1"}
    cases = chosen_trainings(given.get, CPU, smoke=False).scaling_cases()
    assert {case.ranks for case in cases if case.scaling == "strong"} == {1, 2}
    assert {case.ranks for case in cases if case.scaling == "weak"} == {1, 2, 3}
    assert {case.strategy for case in cases} == {"none", "zero1"}


def test_grid_takes_seconds_without() -> None:
    assert [case.strategy for case in default_trainings(CPU, smoke=False).cases()] == [*STRATEGIES]
    smoke = default_trainings(CPU, smoke=True)
    assert [case.strategy for case in smoke.cases()] == ["none", "flashddp"]
    assert {case.size for case in (*smoke.cases(), *smoke.bucket_cases())} == {"debug"}


def test_choices_select_cases() -> None:
    cases = selected(
        "--strategies=zero1,naive", "--ranks=3", "--sizes=debug", "--contexts=16",
        "--communications=bf16", "--precisions=tf32,bf16", "--rank-batch=5,6",
        "-k", "data_parallel and not scaling",
    )  # fmt: skip
    assert [case.split("::")[1] for case in cases] == [
        f"bench_data_parallel[{strategy}-debug-16-{batch}-3-bf16-bf16]"
        for batch in (5, 6)
        for strategy in ("zero1", "naive")
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--strategies=ddp", "--strategies must be one of none, naive, "),
        ("--ranks=0", "--ranks must list integers of at least 1, got '0'"),
        ("--communications=fp8", "--communications must be one of fp32, bf16, got 'fp8'"),
        ("--bucket-mb=x", "--bucket-mb must list integers of at least 1, got 'x'"),
        ("--scalings=both", "--scalings must be one of weak, strong, got 'both'"),
        ("--rank-batch=0", "--rank-batch must list integers of at least 1, got '0'"),
    ],
)
def test_wrong_choices_are_one_line(option: str, message: str) -> None:
    name, _, value = option[2:].partition("=")
    given = {name.replace("-", "_"): value}
    with pytest.raises(UsageError) as error:
        chosen_trainings(given.get, CPU, smoke=False)
    assert str(error.value).startswith(f"benchmarks: {message}")
    assert "\n" not in str(error.value)


def test_options_are_what_a_strategy_takes() -> None:
    half = {"precision": "bf16", "communication": "fp32"}
    assert case_of("none").training.options() == {}
    assert case_of("flashddp", bucket_mb=7, **half).training.options() == {"bucket_size_mb": 7}
    bf16, fp32 = torch.bfloat16, torch.float32
    assert case_of("naive", communication="bf16").training.options() == {
        "communication_dtype": bf16
    }
    for sharded in ("fsdp", "torch_fsdp2"):
        assert case_of(sharded, **half).training.options() == {
            "compute_dtype": bf16,
            "communication_dtype": fp32,
        }
        own = case_of(sharded, precision="bf16", communication="bf16").training.options()
        assert own == {"compute_dtype": bf16}


# --- what cannot run ---


def test_missing_devices_and_memory_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(data_parallel_cases, "available_bytes", lambda _: 10 * 2**30)
    with pytest.raises(NotMeasured) as end:
        case_of("naive", ranks=4).refuse_what_cannot_run(GPU)
    assert (end.value.status, end.value.reason) == (
        "skipped",
        "nccl: needs 4 CUDA devices, found 2",
    )
    # 16 bytes of each of 969 million weights; with all but the norms' on two ranks, half of it.
    with pytest.raises(NotMeasured, match=r"needs at least 14.4. GiB, there are 10.00 GiB") as end:
        case_of("torch_ddp", size="large").refuse_what_cannot_run(GPU)
    assert end.value.status == "oom"
    case_of("torch_fsdp2", size="large").refuse_what_cannot_run(GPU)
    with pytest.raises(NotMeasured, match="predicted"):
        case_of("torch_fsdp2", size="large").refuse_what_cannot_run(CPU)


class FailingPool:
    """Ranks of which the second always raises."""

    def __init__(self, traceback: str) -> None:
        self.error = RankFailedError(1, 2, Failure("failed", traceback, False, 0.0))

    def run(self, *_: Any, **__: Any) -> list[Any]:
        raise self.error


def test_memory_that_runs_out_on_a_rank_is_a_row() -> None:
    message = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB."
    with pytest.raises(NotMeasured) as end:
        bench_data_parallel.training_results(FailingPool(message), case_of("flat"))  # type: ignore[arg-type]
    assert end.value.status == "oom"
    assert end.value.reason == "rank 1 ran out of memory allocating 2.50 GiB"
    assert end.value.metrics == {"requested_bytes": 2.5 * 2**30}


def test_other_failures_are_not_swallowed() -> None:
    with pytest.raises(RankFailedError, match="ValueError: odd"):
        bench_data_parallel.training_results(FailingPool("ValueError: odd"), case_of("flat"))  # type: ignore[arg-type]


# --- rows ---


def found(rank: int, *, profiled: bool = True) -> TrainingResult:
    """Return what a rank has to tell, the second having more to hold and less to wait for."""
    held = dict(zip(KINDS, (10, 20, 30 + rank, 4, 5), strict=True)) | {"buffers": 1}
    timeline = Timeline(
        step_ms=9.0,
        compute=[(0.0, 4.0), (6.0, 8.0)],
        communication=[(3.0, 6.5 - rank)],
        gathers=[(3.0, 5.0)] if rank else [],
    )
    return TrainingResult(
        seconds=[1.0 + rank, 2.0 - rank],
        loss=3.5,
        phases={"after_step": Phase(peak_bytes=70 + rank, held=held)},
        step_peak_bytes=80 - rank,
        log=[Collective("all_reduce", 25, torch.float32, 100, 2)],
        timeline=timeline if profiled else None,
    )


def test_ranks_become_one_row() -> None:
    workload = replayed(case_of("zero1"), [found(0), found(1)], {"call_us": 2.0}, profiled=True)
    assert workload.replay_seconds == [2.0, 2.0]
    assert workload.metrics is not None
    metrics = workload.metrics()
    assert metrics["peak_bytes"] == 80
    assert metrics["after_step_optimizer_state_bytes"] == 31
    assert metrics["after_step_held_bytes"] == 10 + 20 + 31 + 4
    assert metrics["after_step_peak_bytes"] == 71
    assert metrics["communication_ms"] == 2.5
    assert metrics["unhidden_ms"] == 1.5
    assert metrics["gather_wait_ms"] == 1.0
    assert metrics["call_us"] == 2.0
    assert workload.count is not None
    assert workload.count() == {"collectives": 1, "wire_bytes": 100, "all_reduce": 1}
    assert workload.timeline is not None
    assert unpack(workload.timeline["1 communication"]) == [(3.0, 5.5)]
    assert list(workload.timeline) == [f"{r} {kind}" for r in (0, 1)
                                       for kind in ("compute", "communication")]  # fmt: skip


def test_a_peers_messages_are_not_counted() -> None:
    workload = replayed(case_of("torch_ddp"), [found(0)], {}, profiled=True)
    assert workload.count is not None
    assert workload.count() == {}


def test_a_missing_timeline_has_a_reason() -> None:
    for profiled, reason in ((True, "the profiler saw no step"), (False, "not asked for")):
        ranks = [found(0, profiled=False), found(1, profiled=False)]
        workload = replayed(case_of("flat"), ranks, {}, profiled=profiled)
        assert workload.timeline is None
        assert workload.facts == {"attention": "sdpa", "timeline": reason}
        assert workload.metrics is not None
        assert "communication_ms" not in workload.metrics()


def test_buckets_are_predicted_from_measured_links() -> None:
    # 1 ms without size; 10 ms more for 100 MB: 10 GB/s.
    links = [
        LinkTimes(small=[1e-3, 0.5e-3, 1e-3], large=[11e-3, 5e-3, 5e-3], large_bytes=10**8),
        LinkTimes(small=[1e-3, 1e-3, 0.0], large=[5e-3, 11e-3, 11e-3], large_bytes=10**8),
    ]
    case = case_of("flashddp", size="small", bucket_mb=100)
    found = bucket_prediction(case, links)
    assert found["call_us"] == pytest.approx(1000)
    assert found["link_gb_per_s"] == pytest.approx(10)
    weights = 4 * (12 * (4 * 768**2 + 3 * 768 * 3072) + 2 * 10_000 * 768 + 25 * 768)
    num_buckets = weights / (100 * 2**20)
    expected = weights / num_buckets / 1e10 + num_buckets * 1e-3
    assert found["predicted_exposed_ms"] == pytest.approx(1e3 * expected)
    assert found["best_bucket_mb"] == pytest.approx((weights * 1e10 * 1e-3) ** 0.5 / 2**20)
    assert "predicted_exposed_ms" not in bucket_prediction(case._replace(bucket_mb=None), links)


def test_communication_is_predicted_from_what_was_sent() -> None:
    """Four ranks send 1.5 bytes for each byte of an all-reduce, 0.75 for one that is gathered."""
    links = [LinkTimes(small=[0.0], large=[10e-3], large_bytes=10**8)] * 4
    names = ("all_reduce", "all_gather_into")
    log = [Collective(name, 10**8 // 4, torch.float32, 10**8, 4) for name in names]
    result = TrainingResult(
        seconds=[1.0], loss=0.0, phases={}, step_peak_bytes=None, log=log, timeline=None
    )
    found = communication_prediction(case_of("zero1", ranks=4), [result] * 4, links)
    assert found["link_gb_per_s"] == pytest.approx(10)
    assert found["predicted_communication_ms"] == pytest.approx(10 + 5)
    assert communication_prediction(case_of("torch_zero", ranks=4), [result] * 4, links) == {}


# --- ranks ---


class TestOnRanks:
    """Real trainings of the smallest model."""

    pytestmark = ON_RANKS

    @pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "none"])
    def test_all_strategies_train_the_same(self, strategy: str) -> None:
        results = pool(2).run(train_rounds, case_of(strategy).training, profiled=True, **HOW)
        reference = pool(2).run(train_rounds, case_of("naive").training, profiled=False, **HOW)
        assert len({len(result.seconds) for result in results}) == 1
        assert min(second for result in results for second in result.seconds) > 0
        case = case_of(strategy)
        expected = case.predicted()
        assert expected is not None
        for result in results:
            assert result.loss == pytest.approx(reference[0].loss, rel=1e-6)
            assert list(result.phases) == ["init", "before_step", "after_step"]
            held = result.phases["after_step"].held
            assert held["parameters"] == pytest.approx(expected.parameters, rel=0.02)
            assert held["gradients"] == pytest.approx(expected.gradients, rel=0.02)
            assert result.phases["before_step"].held["optimizer_state"] == 0
            assert result.timeline is not None
            assert result.timeline.communication_ms > 0
        state = sum(result.phases["after_step"].held["optimizer_state"] or 0 for result in results)
        assert state == pytest.approx(2 * expected.optimizer_state, rel=0.02)
        assert bool(results[0].timeline.gathers) == ("fsdp" in strategy)
        assert reference[0].timeline is None

    def test_ranks_alone_do_not_communicate(self) -> None:
        results = pool(2).run(train_rounds, case_of("none").training, profiled=True, **HOW)
        for result in results:
            assert result.log == []
            assert result.timeline.communication == []


@pytest.mark.distributed
def test_smoke_measures_all_studies(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    result = run("--smoke", "-k", "data_parallel", f"--benchmark-json={output}")
    assert result.returncode == 0, result.stdout + result.stderr
    data: dict[str, Any] = json.loads(output.read_text())
    records = [entry["extra_info"] for entry in data["benchmarks"]]
    cases = [(record["study"], record["case"]["strategy"]) for record in records]
    assert cases == [
        ("data_parallel", "none"),
        ("data_parallel", "flashddp"),
        ("data_parallel_buckets", "none"),
        ("data_parallel_buckets", "flashddp"),
        ("scaling", "none"),
        ("scaling", "none"),
        ("scaling", "flashddp"),
    ]
    assert records[4]["case"]["ranks"] == 1
    assert "predicted_communication_ms" not in records[4]["metrics"]
    for record, entry in zip(records, data["benchmarks"], strict=True):
        ranks = record["case"]["ranks"]
        assert record["tokens"] == ranks * 2 * 32
        assert record["warmup_rounds"] == 3
        assert set(record["timeline"]) >= {"0 compute", f"{ranks - 1} communication"}
        assert len(json.dumps(record["timeline"])) < 100_000
        assert entry["stats"]["median"] > 0
    assert records[3]["case"]["bucket_mb"] == 1
    assert records[3]["metrics"]["predicted_exposed_ms"] > 0
    assert records[5]["metrics"]["predicted_communication_ms"] == 0
    assert records[6]["metrics"]["predicted_communication_ms"] > 0
