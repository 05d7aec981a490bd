"""The log and the sinks: every step once, whatever was interrupted, and what is asked for."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loop_runs import make_data, run

from cs336_systems.errors import UsageError
from cs336_systems.parallel.environment import init_from_environment
from cs336_systems.train import sinks, throughput
from cs336_systems.train.evaluate import perplexity
from cs336_systems.train.run_log import RunLog, read_log


@given(
    steps=st.lists(st.integers(1, 50), unique=True).map(sorted),
    kept=st.integers(0, 50),
    torn=st.integers(0, 40),
)
def test_a_log_that_is_opened_again(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], kept: int, torn: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    log = RunLog(path)
    for step in steps:
        log.write({"step": step, "loss": 1 / step})
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - torn)])
    before = read_log(path)
    again = RunLog(path, last_step=kept)
    for step in range(kept + 1, 52):
        again.write({"step": step, "loss": 0.5})
    again.close()
    lines = read_log(path)
    assert [line for line in lines if line["step"] <= kept] == [
        line for line in before if line["step"] <= kept
    ]
    numbers = [line["step"] for line in lines]
    assert numbers == sorted(set(numbers))


def test_a_line_is_on_its_way_when_it_is_written(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.write({"step": 1, "perplexity": math.inf})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "perplexity": null}\n'
    log.close()


def test_a_damaged_log_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(UsageError, match=r"^train: .*log\.jsonl is damaged: Expecting"):
        RunLog(tmp_path / "log.jsonl")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.close()
    with Path("/dev/full").open("ab", buffering=0) as full:
        log._file = full
        with pytest.raises(UsageError, match=r"cannot be written: No space left on device$"):
            log.write({"step": 1})


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(300)) == pytest.approx(300)
    assert perplexity(1e6) == math.inf


def test_shares_of_a_known_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    rates = {"fp32": 67e12, "tf32": 494e12, "bf16": 989e12}
    monkeypatch.setattr(throughput, "device_facts", lambda _: {"peak_flops": rates})
    device = torch.device("cpu")
    assert throughput.peak_flops(device, "bf16", 2) == 2 * 989e12
    assert throughput.peak_flops(device, "fp32", 1) == 67e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert throughput.peak_flops(device, "fp32", 1) == 494e12


class FakeWandb(types.ModuleType):
    """As much of the package as is used."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.num_finished = 0

    def init(self, **options: Any) -> FakeWandb:
        self.runs.append(options)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((step, numbers))

    def finish(self) -> None:
        self.num_finished += 1


class FakeWriter:
    """As much of torch.utils.tensorboard.SummaryWriter as is used."""

    all: list[FakeWriter]

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.is_closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        FakeWriter.all.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    fake = FakeWandb()
    FakeWriter.all = []
    tensorboard = types.ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    find = importlib.util.find_spec  # which torch asks too, when it is first compiled with
    installed = ("tensorboard", "wandb")
    monkeypatch.setattr(
        sinks.importlib.util,
        "find_spec",
        lambda name, package=None: object() if name in installed else find(name, package),
    )
    with init_from_environment("gloo"):
        yield fake


def test_sinks_get_what_the_log_gets(fakes: FakeWandb, tmp_path: Path) -> None:
    data = str(make_data(tmp_path))
    out = tmp_path / "out"
    asked = {"logging.wandb": True, "logging.tensorboard": True, "logging.wandb_project": "mine"}
    run(data, str(out), {**asked, "training.num_steps": 4})
    run(data, str(out), {**asked, "training.num_steps": 6})
    lines = read_log(out / "log.jsonl")
    assert [step for step, _ in fakes.logged] == [line["step"] for line in lines] == [2, 4, 6]
    assert fakes.logged[0][1]["loss"] == lines[0]["loss"]
    assert fakes.logged[1][1]["validation_loss"] == lines[1]["validation_loss"]
    assert "sample" not in fakes.logged[1][1]
    first, second = fakes.runs
    assert (first["project"], first["name"], first["dir"]) == ("mine", "run", str(out))
    assert first["config"]["training"]["num_steps"] == 4
    # Gone on with as the same run there.
    assert first["id"] == second["id"] == (out / "wandb_id.txt").read_text()
    assert fakes.num_finished == 2

    one, two = FakeWriter.all
    assert (one.purge_step, two.purge_step, one.is_closed, two.is_closed) == (1, 5, True, True)
    assert one.folder == str(out / "tensorboard")
    assert ("loss", lines[2]["loss"], 6) in two.scalars


def test_a_new_run_is_a_new_one_there_too(fakes: FakeWandb, tmp_path: Path) -> None:
    data = str(make_data(tmp_path))
    anew = {"logging.wandb": True, "training.num_steps": 2, "checkpointing.resume": False}
    for _ in range(2):
        run(data, str(tmp_path / "out"), anew)
    first, second = fakes.runs
    assert first["id"] != second["id"]
    assert json.loads(json.dumps(first["config"])) == first["config"]
