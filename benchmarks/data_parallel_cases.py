"""Which trainings on several ranks are run by default, and what the command line chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from choices import at_least, listed, one_of
from data_parallel_ranks import DTYPES, Training
from model_size import model_config

from cs336_systems.accounting import pass_flops
from cs336_systems.config import PRESETS
from cs336_systems.measure.memory import available_bytes, gib
from cs336_systems.measure.record import Case
from cs336_systems.measure.workload import NotMeasured
from cs336_systems.parallel import STRATEGIES
from cs336_systems.parallel.memory_model import MODELLED, RankBytes, Setting, Weights, rank_bytes

WARMUP_STEPS = 3
STEPS_PER_ROUND = {"cuda": 5, "cpu": 1}
"""Back to back, because a strategy may hide work of one step behind the next."""
ATTENTION = "sdpa"
BASELINE = "none"
BUCKETED = ("flashddp", "torch_ddp")
SCALINGS = ("weak", "strong")
"""Weak: every rank keeps its batch. Strong: ranks divide the batch of one."""
SCALED = (
    BASELINE, "flashddp", "flashddp_ce", "torch_ddp", "zero1", "torch_zero", "fsdp", "torch_fsdp2"
)  # fmt: skip
_COUNTERPARTS = {"torch_ddp": "flashddp", "torch_zero": "zero1", "torch_fsdp2": "fsdp"}

Option = Callable[[str], Any]


class TrainingCase(NamedTuple):
    """One training on so many ranks."""

    strategy: str
    size: str
    context: int
    batch: int
    ranks: int
    precision: str
    communication: str
    bucket_mb: int | None = None
    attention: str | None = None
    """None: `ATTENTION`, in a study that has it everywhere."""
    scaling: str | None = None

    @property
    def training(self) -> Training:
        """What each rank is to do."""
        return Training(
            strategy=self.strategy,
            size=self.size,
            context=self.context,
            batch=self.batch,
            precision=self.precision,
            communication=self.communication,
            attention=self.attention or ATTENTION,
            bucket_mb=self.bucket_mb,
        )

    def case(self, study: str, device: torch.device) -> Case:
        """Return what is recorded of it: tokens are those of all ranks, FLOPs of each."""
        config = model_config(self.size, self.context)
        params = {name: value for name, value in self._asdict().items() if value is not None}
        return Case(
            study=study,
            params=params,
            warmup_rounds=WARMUP_STEPS,
            calls_per_round=STEPS_PER_ROUND[device.type],
            tokens=self.ranks * self.batch * self.context,
            flops=pass_flops(config, self.batch, self.context, "full_step"),
            flops_dtype=self.precision,
        )

    def predicted(self) -> RankBytes | None:
        """Return what a rank should hold; a peer what the row of ours that does the same holds."""
        modelled = _COUNTERPARTS.get(self.strategy, self.strategy)
        if modelled not in MODELLED:
            return None
        config = model_config(self.size, self.context)
        compute = DTYPES[self.precision].itemsize if modelled == "fsdp" else None
        setting = Setting(
            weights=Weights.of(config),
            world_size=self.ranks,
            communication_bytes=DTYPES[self.communication].itemsize,
            compute_bytes=compute,
        )
        return rank_bytes(modelled, setting)

    def refuse_what_cannot_run(self, device: torch.device) -> None:
        """Raise NotMeasured where devices or memory are missing."""
        on_gpu = device.type == "cuda"
        found = torch.cuda.device_count()
        if on_gpu and found < self.ranks:
            raise NotMeasured("skipped", f"nccl: needs {self.ranks} CUDA devices, found {found}")
        expected, have = self.predicted(), available_bytes(device)
        if expected is None or have is None:
            return
        # Ranks on the CPU share the host's memory.
        need = round(expected.held) * (1 if on_gpu else self.ranks)
        if need > have:
            reason = f"predicted: needs at least {gib(need)}, there are {gib(have)}"
            raise NotMeasured("oom", reason, predicted_bytes=need)


@dataclass(frozen=True, kw_only=True)
class Trainings:
    """All that are run."""

    strategies: tuple[str, ...]
    sizes: tuple[str, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    ranks: tuple[int, ...]
    precisions: tuple[str, ...]
    communications: tuple[str, ...]
    bucket_mb: tuple[int, ...]
    scalings: tuple[str, ...] = SCALINGS
    profiled: bool = True

    def _settings(self) -> Iterator[dict[str, Any]]:
        """Yield what several strategies are compared in, ranks that are there already first."""
        for ranks in self.ranks:
            for size in self.sizes:
                for context, batch in product(self.contexts, self.batches):
                    for precision, communication in product(self.precisions, self.communications):
                        yield {
                            "size": size,
                            "context": context,
                            "batch": batch,
                            "ranks": ranks,
                            "precision": precision,
                            "communication": communication,
                        }

    def cases(self) -> list[TrainingCase]:
        """Return every strategy in every setting."""
        return [
            TrainingCase(strategy=strategy, **setting)
            for setting in self._settings()
            for strategy in self.strategies
        ]

    def bucket_cases(self) -> list[TrainingCase]:
        """Return the sweep of bucket sizes with the largest batch, beside which most can hide; what
        it is compared with first."""
        swept = [name for name in self.strategies if name in BUCKETED]
        if not self.bucket_mb or not swept:
            return []
        return [
            TrainingCase(strategy=strategy, bucket_mb=megabytes, **setting)
            for setting in self._settings()
            if setting["batch"] == max(self.batches)
            for strategy, megabytes in (
                (BASELINE, None),
                *((name, size) for name in swept for size in self.bucket_mb),
            )
        ]

    def scaling_cases(self) -> list[TrainingCase]:
        """Return weak and strong scaling of the largest batch, from one rank alone on.

        Strong scaling leaves out numbers of ranks that do not divide the batch.
        """
        several = [name for name in SCALED if name in (BASELINE, *self.strategies)]
        found = []
        for ranks, scaling in product(sorted({1, *self.ranks}), self.scalings):
            batch, left_over = divmod(max(self.batches), ranks if scaling == "strong" else 1)
            if left_over:
                continue
            strategies = [BASELINE] if ranks == 1 else several
            settings = replace(self, ranks=(ranks,), batches=(batch,))._settings()
            found += [
                TrainingCase(strategy=strategy, scaling=scaling, **setting)
                for setting in settings
                for strategy in strategies
            ]
        return found


def default_trainings(device: torch.device, *, smoke: bool) -> Trainings:
    """Return the handout's, XL on two GPUs, and on more of them; without, what takes seconds."""
    common: dict[str, Any] = {"communications": ("fp32",), "strategies": tuple(STRATEGIES)}
    if device.type == "cuda" and not smoke:
        found = torch.cuda.device_count()
        return Trainings(
            sizes=("xl",),
            contexts=(512,),
            # The host's time decides with the first, the device's with the second.
            batches=(2, 24),
            ranks=(2, *(number for number in (4, 8) if number <= found)),
            precisions=("bf16",),
            bucket_mb=(1, 10, 100, 250, 500, 1000),
            **common,
        )
    if smoke:
        common |= {"strategies": (BASELINE, "flashddp"), "scalings": ("weak",)}
    return Trainings(
        sizes=("debug",) if smoke else ("tiny",),
        contexts=(32,),
        batches=(2,),
        ranks=(2,),
        precisions=("fp32",),
        bucket_mb=(1,) if smoke else (1, 10),
        **common,
    )


def add_options(group: pytest.OptionGroup) -> None:
    """Register the options that choose trainings."""
    group.addoption("--strategies", help=f"data parallel: {', '.join(STRATEGIES)}")
    group.addoption("--ranks", help="data parallel: numbers of ranks, e.g. 2,4")
    group.addoption("--communications", help="data parallel: dtypes of gradients: fp32, bf16")
    group.addoption(
        "--scalings", help="data parallel: weak (batch of a rank stays) or strong (is divided)"
    )
    group.addoption("--bucket-mb", help="data parallel: bucket sizes, e.g. 1,10,100,1000")
    group.addoption(
        "--rank-batch",
        help="data parallel: sequences on each rank, e.g. 2,24; LM matrix: the largest",
    )
    group.addoption(
        "--no-timeline", action="store_true", help="data parallel: profile no step after the timed"
    )


def chosen_trainings(option: Option, device: torch.device, *, smoke: bool) -> Trainings:
    """Return the trainings that the command line chooses.

    Raises: UsageError for a value that is not a choice.
    """
    default = default_trainings(device, smoke=smoke)

    def names(key: str, choices: Iterable[str]) -> tuple[str, ...]:
        parse = one_of(f"--{key}", choices)
        return listed(option(key), f"--{key}", getattr(default, key), parse)

    def numbers(field: str, key: str) -> tuple[int, ...]:
        name = f"--{key.replace('_', '-')}"
        return listed(option(key), name, getattr(default, field), at_least(name, 1))

    return Trainings(
        strategies=names("strategies", STRATEGIES),
        sizes=names("sizes", PRESETS),
        contexts=numbers("contexts", "contexts"),
        batches=numbers("batches", "rank_batch"),
        ranks=numbers("ranks", "ranks"),
        precisions=chosen_precisions(option, default.precisions),
        communications=names("communications", DTYPES),
        bucket_mb=numbers("bucket_mb", "bucket_mb"),
        scalings=names("scalings", SCALINGS),
        profiled=not option("no_timeline"),
    )


def chosen_precisions(option: Option, default: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the chosen precisions that ranks train in; the choices are checked before."""
    chosen = listed(option("precisions"), "--precisions", default, str)
    return tuple(name for name in chosen if name in DTYPES)
