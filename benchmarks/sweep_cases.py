"""Which numbers of queries and keys the forward sweep of attention runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import pytest
import torch
from attention_bench import DTYPES
from choices import at_least, listed, one_of
from data_parallel_cases import Option

from cs336_systems.attention import ATTENTION
from cs336_systems.errors import bad

PLAIN = "scaled_dot_prod_attention"
KERNELS = (PLAIN, "vectorized_torch", "flash_attention_triton", "sdpa")
TIERS = (128, 256, 512, 1024, 2048)


class Pair(NamedTuple):
    """How many queries look at how many keys."""

    queries: int
    keys: int

    @property
    def tier(self) -> int:
        """The longer side."""
        return max(self)

    @property
    def ratio(self) -> str:
        """How many times longer one side is, in words."""
        common = gcd(*self)
        queries, keys = self.queries // common, self.keys // common
        if queries == keys:
            return "N_q = N_k"
        if keys == 1:
            return f"N_q = {queries} N_k"
        return f"N_k = {keys} N_q" if queries == 1 else f"N_q : N_k = {queries} : {keys}"

    @classmethod
    def parse(cls, word: str) -> Pair:
        """Return the pair of `128:64`.

        Raises: UsageError for a word of another form.
        """
        queries, colon, keys = word.partition(":")
        if not colon or not (queries.isdigit() and keys.isdigit() and int(queries) and int(keys)):
            raise bad("benchmarks", "--tiers", "list QUERIES:KEYS, e.g. 128:64", word)
        return cls(int(queries), int(keys))


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All forward passes of the sweep."""

    kernels: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    pairs: tuple[Pair, ...]
    batch: int
    heads: int
    causal: bool = False

    @property
    def baseline(self) -> str:
        """The kernel that speed-up is reported against."""
        return PLAIN if PLAIN in self.kernels else self.kernels[0]


def default_sweep(device: torch.device, *, smoke: bool) -> Sweep:
    """Return every pair of lengths on a GPU; without, what takes seconds."""
    if device.type == "cuda" and not smoke:
        return Sweep(
            kernels=KERNELS,
            dtypes=("bf16",),
            head_dims=(64,),
            pairs=every_pair(TIERS),
            batch=4,
            heads=16,
        )
    return Sweep(
        kernels=(PLAIN, "sdpa"),
        dtypes=("fp32",),
        head_dims=(16,) if smoke else (64,),
        pairs=(Pair(64, 32),) if smoke else (Pair(128, 128), Pair(128, 256), Pair(256, 128)),
        batch=1,
        heads=4,
    )


def every_pair(lengths: Iterable[int]) -> tuple[Pair, ...]:
    """Return all pairs of some lengths, short ones first."""
    lengths = tuple(lengths)
    pairs = [Pair(queries, keys) for queries in lengths for keys in lengths]
    return tuple(sorted(pairs, key=lambda pair: (pair.tier, pair)))


def add_options(group: pytest.OptionGroup) -> None:
    """Register the options that only the sweep has; `--rows`, `--dtypes` and `--head-dims` are the
    attention studies'."""
    group.addoption("--tiers", help="attention sweep: QUERIES:KEYS, e.g. 128:128,128:64")
    group.addoption("--sweep-batch", help="attention sweep: batch size")
    group.addoption("--sweep-heads", help="attention sweep: number of heads")
    group.addoption("--sweep-causal", action="store_true", help="attention sweep: causal mask")


def chosen_sweep(option: Option, device: torch.device, *, smoke: bool) -> Sweep:
    """Return the passes that the command line chooses.

    Raises: UsageError for a value that is not a choice.
    """
    default = default_sweep(device, smoke=smoke)

    def number(key: str, fallback: int) -> int:
        name = f"--{key.replace('_', '-')}"
        given = option(key)
        return fallback if given is None else at_least(name, 1)(given)

    return Sweep(
        kernels=listed(option("rows"), "--rows", default.kernels, one_of("--rows", ATTENTION)),
        dtypes=listed(option("dtypes"), "--dtypes", default.dtypes, one_of("--dtypes", DTYPES)),
        head_dims=listed(
            option("head_dims"), "--head-dims", default.head_dims, at_least("--head-dims", 1)
        ),
        pairs=listed(option("tiers"), "--tiers", default.pairs, Pair.parse),
        batch=number("sweep_batch", default.batch),
        heads=number("sweep_heads", default.heads),
        causal=option("sweep_causal"),
    )
