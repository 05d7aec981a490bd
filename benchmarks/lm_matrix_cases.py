"""Which short training runs are made: attention kernels x data-parallel wrappers on one model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from choices import at_least, listed, one_of
from data_parallel_cases import BASELINE, Option, TrainingCase, chosen_precisions
from model_size import FIELDS, override, size_name
from token_batches import TokenFiles, check_tokens

from cs336_systems.attention import ATTENTION
from cs336_systems.config import ModelConfig, preset
from cs336_systems.parallel import STRATEGIES

KERNELS = ("scaled_dot_prod_attention", "vectorized_torch", "flash_attention_triton")
WRAPPERS = (BASELINE, "naive", "flashddp", "torch_ddp")
_SEED_MODEL = ModelConfig(
    d_model=512, d_ff=4096, num_layers=24, num_heads=16, vocab_size=10_000, context_length=256
)
_CPU_MODEL = preset("tiny", vocab_size=10_000, context_length=64)


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """All runs of the matrix."""

    kernels: tuple[str, ...]
    wrappers: tuple[str, ...]
    model: ModelConfig
    contexts: tuple[int, ...]
    batch: int
    """Sequences on each rank."""
    ranks: tuple[int, ...]
    """Of every wrapper but `none`, which has one."""
    precisions: tuple[str, ...]
    epochs: int
    epoch_steps: int
    """Steps in which one rank sees an epoch's tokens."""
    data: TokenFiles = field(default_factory=TokenFiles)
    num_tokens: int = 0
    """In the training file; 0 without one."""

    def cases(self) -> list[TrainingCase]:
        """Return every run, those on as many ranks together; many first, as ranks may be there
        from the benchmarks before."""
        groups = [(ranks, [w for w in self.wrappers if w != BASELINE]) for ranks in self.ranks]
        groups.append((1, [w for w in self.wrappers if w == BASELINE]))
        return [
            TrainingCase(
                strategy=wrapper,
                size=size_name(self.model),
                context=context,
                batch=self.batch,
                ranks=ranks,
                precision=precision,
                communication="fp32",
                attention=kernel,
            )
            for ranks, wrappers in groups
            for context in self.contexts
            for precision in self.precisions
            for kernel in self.kernels
            for wrapper in wrappers
        ]

    def steps(self, case: TrainingCase) -> int:
        """Return in how many steps the ranks of a case see an epoch's tokens."""
        return -(-self.epoch_steps // case.ranks)

    def said(self, case: TrainingCase) -> str:
        """Return in words what is trained, on what, and what an epoch is."""
        model = self.model
        source = "random tokens"
        if self.data.train_path is not None:
            source = f"{Path(self.data.train_path).name} ({self.num_tokens:,} tokens)"
        tokens = self.epoch_steps * case.batch * case.context
        return (
            f"Model: {model.num_layers} layers, {model.num_heads} heads, d_model {model.d_model}, "
            f"d_ff {model.d_ff}, vocabulary {model.vocab_size:,}, context {case.context}, "
            f"{case.batch} sequences a rank, {case.precision}. Data: {source}; an epoch is "
            f"{tokens:,} tokens, {self.epoch_steps} steps of one rank; {self.epochs} timed"
        )


def default_matrix(device: torch.device, *, smoke: bool) -> Matrix:
    """Return the seed document's on GPUs; without, what takes seconds."""
    if device.type == "cuda" and not smoke:
        return Matrix(
            kernels=KERNELS,
            wrappers=WRAPPERS,
            model=_SEED_MODEL,
            contexts=(_SEED_MODEL.context_length,),
            batch=8,
            ranks=(max(2, torch.cuda.device_count()),),
            precisions=("bf16",),
            epochs=5,
            epoch_steps=10,
        )
    model = preset("debug") if smoke else _CPU_MODEL
    return Matrix(
        kernels=KERNELS[:1] if smoke else KERNELS[:2],
        wrappers=(BASELINE, "flashddp"),
        model=model,
        contexts=(32,) if smoke else (model.context_length,),
        batch=2 if smoke else 4,
        ranks=(2,),
        precisions=("fp32",),
        epochs=2 if smoke else 3,
        epoch_steps=2 if smoke else 4,
    )


def add_options(group: pytest.OptionGroup) -> None:
    """Register the options that only the matrix has; the others are the attention studies'
    `--rows` and the data-parallel benchmark's."""
    fields = ", ".join(f"{field}=N" for field in FIELDS)
    group.addoption("--lm-model", help=f"LM matrix: {fields}; others keep their default")
    group.addoption("--lm-epochs", help="LM matrix: timed epochs")
    group.addoption("--lm-epoch-steps", help="LM matrix: steps in which one rank sees an epoch")
    group.addoption("--train-path", help="LM matrix: .npy of token ids to train on")
    group.addoption("--val-path", help="LM matrix: .npy of token ids to validate on")


def chosen_matrix(option: Option, device: torch.device, *, smoke: bool) -> Matrix:
    """Return the runs that the command line chooses.

    Raises: UsageError for a value that is not a choice, or a token file that cannot be used.
    """
    default = default_matrix(device, smoke=smoke)

    def names(key: str, fallback: Iterable[str], choices: Iterable[str]) -> tuple[str, ...]:
        return listed(option(key), f"--{key}", tuple(fallback), one_of(f"--{key}", choices))

    def number(key: str, fallback: int) -> int:
        name = f"--{key.replace('_', '-')}"
        given = option(key)
        return fallback if given is None else at_least(name, 1)(given)

    contexts = listed(option("contexts"), "--contexts", default.contexts, at_least("--contexts", 1))
    model = override("--lm-model", option("lm_model"), default.model)
    batch = max(
        listed(option("rank_batch"), "--rank-batch", (default.batch,), at_least("--rank-batch", 1))
    )
    data = TokenFiles(train_path=option("train_path"), val_path=option("val_path"))
    num_tokens = _check(data, model, contexts)
    default_steps = default.epoch_steps
    if num_tokens:
        default_steps = min(default_steps, max(1, num_tokens // (batch * max(contexts))))
    return Matrix(
        kernels=names("rows", default.kernels, ATTENTION),
        wrappers=names("strategies", default.wrappers, STRATEGIES),
        model=model,
        contexts=contexts,
        batch=batch,
        ranks=listed(option("ranks"), "--ranks", default.ranks, at_least("--ranks", 1)),
        precisions=chosen_precisions(option, default.precisions),
        epochs=number("lm_epochs", default.epochs),
        epoch_steps=number("lm_epoch_steps", default_steps),
        data=data,
        num_tokens=num_tokens,
    )


def _check(data: TokenFiles, model: ModelConfig, contexts: Iterable[int]) -> int:
    """Refuse files that the runs could not use; return the training file's number of tokens."""
    longest = replace(model, context_length=max(contexts))
    check_tokens("--val-path", data.val_path, longest)
    return check_tokens("--train-path", data.train_path, longest)
