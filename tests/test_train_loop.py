"""Training in one process: it learns, and it says in one line why not."""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checkpoint_ranks import same
from cs336_basics.model import BasicsTransformerLM
from loop_runs import ROUNDING, make_data, run, run_broken, saved, weights
from torch import Tensor, nn

from cs336_systems.errors import UsageError
from cs336_systems.parallel.environment import init_from_environment
from cs336_systems.train.losses import Losses
from cs336_systems.train.run_log import read_log
from cs336_systems.train.step import Stepper


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Be the only rank of a group."""
    with init_from_environment("gloo"):
        yield
        if not dist.is_initialized():  # the test has left it for one of its own
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_a_run_and_its_files(data: str, tmp_path: Path) -> None:
    result = run(data, str(tmp_path), draw=True)
    assert (result.final_step, result.was_interrupted) == (8, False)
    assert result.perplexity == pytest.approx(math.exp(result.validation_loss or 0.0))
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert list(lines[0]) == [
        *("step", "loss", "mean_loss", "lr", "grad_norm"),
        *("tokens_per_s", "tflops", "share_of_peak", "seconds"),
    ]
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 8]
    assert lines[-1]["loss"] == result.train_loss
    assert lines[-1]["validation_loss"] == result.validation_loss
    assert lines[0]["lr"] == 1e-2
    assert lines[-1]["lr"] == 1e-4
    assert all(line["share_of_peak"] is None for line in lines)  # of a CPU it is not known
    assert all(line["tokens_per_s"] > 0 and line["tflops"] > 0 for line in lines)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    sample = (tmp_path / "sample.txt").read_text()
    assert sample == result.sample + "\n"
    assert sample.startswith("Once upon a time")
    assert len(lines[1]["sample"]) < len(sample)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [
        *("checkpoints", "log.jsonl", "loss.png", "model.pt", "model_config.json", "sample.txt")
    ]
    model = BasicsTransformerLM.from_pretrained(tmp_path)
    assert same(dict(model.state_dict()), saved(tmp_path)[0]["model"])


def test_a_line_has_the_mean_of_its_steps_also_across_an_interruption(
    data: str, tmp_path: Path
) -> None:
    every, second = tmp_path / "every", tmp_path / "second"
    run(data, str(every), {"logging.interval": 1})
    losses = [line["loss"] for line in read_log(every / "log.jsonl")]
    assert [line["mean_loss"] for line in read_log(every / "log.jsonl")] == losses
    run_broken(data, str(second), {"logging.interval": 4}, 3)
    means = [line["mean_loss"] for line in read_log(second / "log.jsonl")]
    assert means == [fmean(losses[:4]), fmean(losses[4:])]


def test_the_loss_falls_on_text_that_ships_with_python(data: str, tmp_path: Path) -> None:
    changes = {"training.num_steps": 120, "training.max_learning_rate": 3e-2}
    result = run(data, str(tmp_path), {**changes, "evaluation.interval": 0, "training.eps": 1e-8})
    first = read_log(tmp_path / "log.jsonl")[0]["loss"]
    # At first it guesses; the counts of single tokens alone are worth a nat and more.
    assert first == pytest.approx(math.log(300), abs=0.5)
    assert result.validation_loss is not None
    assert result.validation_loss < first - 1.2


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_accumulating_changes_nothing_but_roundings(
    micro_batch_size: int, data: str, tmp_path: Path
) -> None:
    run(data, str(tmp_path / "whole"))
    run(data, str(tmp_path / "parts"), {"training.micro_batch_size": micro_batch_size})
    got, wanted = (read_log(tmp_path / name / "log.jsonl") for name in ("parts", "whole"))
    for name in ("loss", "validation_loss", "grad_norm"):
        ours, theirs = ([line[name] for line in log if name in line] for log in (got, wanted))
        assert ours == pytest.approx(theirs, rel=ROUNDING)


@pytest.mark.parametrize(
    ("strategy", "compiled"),
    [
        ("none", "model"),
        ("flashddp", "model"),
        ("flashddp_ce", "model"),
        ("zero1", "blocks"),
        ("fsdp", "blocks"),
    ],
)
def test_compiled_and_wrapped(
    strategy: str, compiled: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as ever; the code that comes out is run without a compiler, which takes longer."""
    real, backends = nn.Module.compile, []

    def compile_quickly(self: nn.Module, **options: Any) -> None:
        backends.append("aot_eager")
        real(self, **options, backend=backends[-1])

    monkeypatch.setattr(nn.Module, "compile", compile_quickly)
    torch.compiler.reset()
    changes = {"training.num_steps": 3, "training.ddp_wrapper": strategy}
    run(data, str(tmp_path / "eager"), changes)
    run(data, str(tmp_path / "compiled"), {**changes, "training.compile": compiled})
    assert backends
    got, wanted = weights(tmp_path / "compiled"), weights(tmp_path / "eager")
    torch.testing.assert_close(got, wanted, rtol=0, atol=ROUNDING)


def test_autocast_is_near_and_not_equal(data: str, tmp_path: Path) -> None:
    full = run(data, str(tmp_path / "fp32"))
    half = run(data, str(tmp_path / "bf16"), {"training.precision": "bf16"})
    assert half.validation_loss != full.validation_loss
    assert half.validation_loss == pytest.approx(full.validation_loss, rel=1e-2)
    kinds = {weight.dtype for weight in weights(tmp_path / "bf16").values()}
    assert kinds == {torch.float32}


def test_losses_are_read_once_for_each_line_of_the_log(data: str, tmp_path: Path) -> None:
    real, steps_read = Tensor.tolist, []
    run_step, now = Stepper.step, [0]

    def step(self: Stepper, step: int, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        now[0] = step
        return run_step(self, step, batch)

    def tolist(self: Tensor) -> Any:
        steps_read.append(now[0])
        return real(self)

    with mock.patch.object(Tensor, "tolist", tolist), mock.patch.object(Stepper, "step", step):
        run(data, str(tmp_path), {"evaluation.interval": 0, "logging.interval": 3})
    # The last one is also that of the sample's tokens.
    assert steps_read == [3, 6, 8, 8]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_on_a_gpu_no_step_waits_for_the_device(data: str, tmp_path: Path) -> None:
    """From the first step to the last, but for where the log is written."""
    real, num_lines = Losses.read, []

    def read(self: Losses) -> None:
        num_lines.append(1)
        torch.cuda.set_sync_debug_mode("default")
        real(self)
        torch.cuda.set_sync_debug_mode("error" if len(num_lines) == 1 else "default")

    dist.destroy_process_group()
    settings = {"training.device": "cuda", "logging.interval": 4, "evaluation.interval": 0}
    with mock.patch.object(Losses, "read", read), init_from_environment():
        run(data, str(tmp_path), {**settings, "training.micro_batch_size": 4})
    assert len(num_lines) >= 2


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model.context_length": 10**6}, "tokens: {data}/train.npy must hold at least context_length"),
    ({"training.device": "cuda"}, "training: device must be that of the process group, cpu with g"),
    ({"training.attention_kernel": "sdpa_flash"}, "training: attention_kernel must be able to run"),
    (
        {"training.ddp_wrapper": "flat", "training.num_ranks": 2},
        "training: num_ranks must be the 1 that were started (torchrun --nproc-per-node starts mor",
    ),
    ({"logging.tensorboard": True}, "logging: tensorboard must be false where the package is not"),
    ({"logging.wandb": True}, "logging: wandb must be false where the package is not installed (p"),
    (
        {"training.ddp_wrapper": "zero1", "training.ddp_options": {"bucket_size_mb": -1}},
        "zero1: bucket_size_mb must be positive or None, got -1",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(list(c)) for c, _ in BAD])
def test_what_cannot_be_trained_is_one_line(
    changes: dict[str, Any],
    message: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"^{re.escape(message.format(data=data))}") as caught:
        run(data, str(tmp_path), changes)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("loss", math.nan, "train: loss must be finite, got nan at step 5"),
        ("loss", -math.inf, "train: loss must be finite, got -inf at step 5"),
        ("norm", math.inf, "train: gradients' norm must be finite, got inf at step 5"),
    ],
)
@pytest.mark.parametrize("interval", [0, 5])
def test_numbers_that_are_none_end_the_run_before_they_are_saved(
    field: str,
    value: float,
    message: str,
    interval: int,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Stepper.step

    def step(self: Stepper, now: int, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        loss, norm = real(self, now, batch)
        broken = torch.tensor(value)
        if now != 5:
            return loss, norm
        return (broken, norm) if field == "loss" else (loss, broken)

    run(data, str(tmp_path), {"training.num_steps": 4})
    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(UsageError, match=f"^{message}$"):
        run(data, str(tmp_path), {"checkpointing.checkpointing_interval": interval})
    assert saved(tmp_path)[1] == 4


def test_without_clipping_there_is_no_norm(data: str, tmp_path: Path) -> None:
    run(data, str(tmp_path), {"training.max_grad_norm": 0.0})
    assert {line["grad_norm"] for line in read_log(tmp_path / "log.jsonl")} == {None}


def test_a_second_interrupt_does_not_wait(data: str, tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    real = Stepper.step

    def step(self: Stepper, now: int, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, now, batch)

    with mock.patch.object(Stepper, "step", step):
        result = run(data, str(tmp_path))
        assert (result.was_interrupted, result.final_step) == (True, 1)

    def twice(self: Stepper, now: int, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, now, batch)

    with mock.patch.object(Stepper, "step", twice), pytest.raises(KeyboardInterrupt):
        run(data, str(tmp_path))
    assert signal.getsignal(signal.SIGINT) is handler
