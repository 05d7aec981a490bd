"""What each rank of the data-parallel benchmark runs; imports no pytest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from cs336_basics.nn_utils import cross_entropy
from model_size import model_config
from token_batches import Batch, TokenFiles
from torch.optim import AdamW

from cs336_systems.measure.memory import peak_bytes, release
from cs336_systems.measure.ranks import time_on_rank
from cs336_systems.measure.timeline import Timeline, step_timeline
from cs336_systems.model import build_model
from cs336_systems.parallel import STRATEGIES, option_names, wrap
from cs336_systems.parallel.collectives import (
    Collective,
    all_reduce,
    communication_device,
    record_collectives,
)
from cs336_systems.parallel.held import held_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEARNING_RATE = 1e-4
MEGABYTE = 2**20
_LATENCY_BYTES = 1024
_BANDWIDTH_BYTES = {"cuda": 512 * MEGABYTE, "cpu": 16 * MEGABYTE}
_LATENCY_ROUNDS = 30
_BANDWIDTH_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every rank trains, and how."""

    strategy: str
    size: str
    context: int
    batch: int
    """Sequences on each rank."""
    precision: str
    communication: str
    """The dtype that gradients travel in."""
    attention: str
    bucket_mb: float | None = None
    """None: the strategy's own, or it has no buckets."""
    data: TokenFiles | None = None
    """None: one batch of random tokens, which is on the device before any step."""

    def options(self) -> dict[str, Any]:
        """Return what `wrap` is to be told."""
        known = option_names(STRATEGIES[self.strategy].load())
        options: dict[str, Any] = {}
        if self.bucket_mb is not None:
            options["bucket_size_mb"] = self.bucket_mb
        computes = DTYPES[self.precision] if "compute_dtype" in known else torch.float32
        if computes != torch.float32:
            options["compute_dtype"] = computes
        # A dtype to cast to is named only where gradients have another one.
        if DTYPES[self.communication] != computes:
            options["communication_dtype"] = DTYPES[self.communication]
        return options


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Memory at one point of training: the most since the point before, and what is held at it."""

    peak_bytes: int | None
    """None on a CPU, whose allocations are not counted."""
    held: dict[str, int | None]
    """By kind, as `held.HeldBytes` names them; activations are the rest of the peak."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Of all ranks together: whether a short run has learnt anything."""

    first: float
    last: float
    validation: float | None
    """After the last step; None without a file."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What one rank has to tell."""

    seconds: list[float]
    loss: float
    """Of the last warm-up step, before which all strategies have done the same."""
    phases: dict[str, Phase]
    """`init`, `before_step` and `after_step` of the very first step."""
    step_peak_bytes: int | None
    """Of a later one."""
    log: list[Collective]
    """Of one step; a peer's own messages are not seen."""
    timeline: Timeline | None
    losses: Losses | None = None
    """Where every step has a batch of its own."""


class Trainer:
    """A model, its wrapper, its optimizer and its batches on this rank."""

    def __init__(self, training: Training, device: torch.device) -> None:
        self.training, self.device = training, device
        self._config = model_config(training.size, training.context)
        self._batches = self._batches_of(training.data)
        self.loss = torch.zeros((), device=device)

    def _batches_of(self, data: TokenFiles | None) -> Iterator[Batch]:
        training, rank = self.training, dist.get_rank()
        if data is not None:
            return data.training_batches(self._config, training.batch, rank, self.device)
        generator = torch.Generator(self.device).manual_seed(1 + rank)
        tokens, targets = torch.randint(
            self._config.vocab_size,
            (2, training.batch, training.context),
            device=self.device,
            generator=generator,
        )
        return repeat((tokens, targets))

    def build(self) -> None:
        """Make model and optimizer, the same on all ranks."""
        torch.manual_seed(0)
        attention = self.training.attention
        model = build_model(self._config, attention=attention, device=self.device)
        self.model = wrap(model, self.training.strategy, **self.training.options())
        fused = {"fused": True} if self.device.type == "cuda" else {}
        self.optimizer = self.model.build_optimizer(AdamW, lr=LEARNING_RATE, **fused)

    def first_step(self) -> dict[str, Phase]:
        """Build, and train the first step; returns the memory of each part."""
        parts = {
            "init": self.build,
            "before_step": self.backward,
            "after_step": lambda: self.optimizer.step(),
        }
        phases = {}
        for name, part in parts.items():
            peak = peak_bytes(self.device, part)
            phases[name] = Phase(peak_bytes=peak, held=self._held(peak))
        return phases

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.training.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.training.precision])

    def backward(self) -> None:
        """Bring every gradient to what the optimizer takes."""
        # The optimizer's, since reading the model's parameters would wait for those under way.
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss_of(next(self._batches))
        loss.backward()
        self.model.finish_gradient_synchronization()
        self.loss = loss.detach()

    def _loss_of(self, batch: Batch) -> torch.Tensor:
        tokens, targets = batch
        with self._autocast():
            return cross_entropy(self.model(tokens), targets)

    @torch.no_grad()
    def validation_loss(self) -> float | None:
        """Return the mean loss of a few batches of the validation file, None without one."""
        data = self.training.data or TokenFiles()
        batches = data.validation_batches(self._config, self.training.batch, self.device)
        losses = [self._loss_of(batch).item() for batch in batches]
        return sum(losses) / len(losses) if losses else None

    def step(self) -> None:
        """Train one step."""
        self.backward()
        self.optimizer.step()

    def steps(self, number: int) -> None:
        """Train some steps back to back."""
        for _ in range(number):
            self.step()

    def _held(self, peak: int | None) -> dict[str, int | None]:
        """Return what is held by now, by kind."""
        # torch's ZeRO keeps its state in the optimizer of its own part.
        optimizer = getattr(self.optimizer, "optim", self.optimizer)
        return asdict(held_bytes(self.model, optimizer, peak_bytes=peak))


def train_rounds(
    training: Training,
    *,
    rounds: int,
    warmup_rounds: int,
    steps_per_round: int,
    max_seconds: float,
    profiled: bool,
) -> TrainingResult:
    """Train a fresh model: look at the first step, warm up, time rounds of steps, profile one.

    A round's time is that of one of its steps.
    """
    device = communication_device()
    release(device)
    trainer = Trainer(training, device)
    phases = trainer.first_step()
    first_loss = trainer.loss
    trainer.steps(warmup_rounds - 1)
    with record_collectives() as log:
        step_peak_bytes = peak_bytes(device, trainer.step)
    loss = trainer.loss

    seconds = time_on_rank(
        partial(trainer.steps, steps_per_round),
        device,
        rounds=rounds,
        warmup_rounds=1,
        max_seconds=max_seconds,
    )
    timeline = step_timeline(trainer.step, device) if profiled else None
    result = TrainingResult(
        seconds=[each / steps_per_round for each in seconds],
        loss=_mean_of_ranks(loss),
        phases=phases,
        step_peak_bytes=step_peak_bytes,
        log=log,
        timeline=timeline,
        losses=None if training.data is None else _losses(trainer, first_loss),
    )
    del trainer
    release(device)
    return result


def _losses(trainer: Trainer, first: torch.Tensor) -> Losses:
    return Losses(
        first=_mean_of_ranks(first),
        last=_mean_of_ranks(trainer.loss),
        validation=trainer.validation_loss(),
    )


def _mean_of_ranks(loss: torch.Tensor) -> float:
    total = loss.clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


@dataclass(frozen=True, kw_only=True)
class LinkTimes:
    """Seconds of all-reduces that are too small to have a size, and of large ones."""

    small: list[float]
    large: list[float]
    large_bytes: int


def link_times() -> LinkTimes:
    """Time what the model of buckets needs to know."""
    device = communication_device()
    large_bytes = _BANDWIDTH_BYTES[device.type]
    times = []
    for num_bytes, rounds in (
        (_LATENCY_BYTES, _LATENCY_ROUNDS),
        (large_bytes, _BANDWIDTH_ROUNDS),
    ):
        message = torch.rand(num_bytes // 4, device=device)
        times.append(
            time_on_rank(
                lambda message=message: all_reduce(message),  # type: ignore[misc]
                device,
                rounds=rounds,
                warmup_rounds=3,
                max_seconds=5.0,
                setup=lambda message=message: message.div_(dist.get_world_size()),  # type: ignore[misc]
            )
        )
    return LinkTimes(small=times[0], large=times[1], large_bytes=large_bytes)
