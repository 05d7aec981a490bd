"""Tiles measured on the GPU at hand instead of taken from the table; CS336_AUTOTUNE=1 asks for it.

The first plan of a kind of input times a few tiles of each kernel on scratch results, keeps the
fastest that agrees with the table's tile, and writes it to a file for later processes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.errors import TritonError
from triton.testing import do_bench

from cs336_systems.attention.tile_cache import UnreadableError, cache_path, merge, read
from cs336_systems.attention.tile_candidates import candidates
from cs336_systems.attention.tiles import Tile
from cs336_systems.attention.triton_launch import Launch
from cs336_systems.errors import bad

VARIABLE = "CS336_AUTOTUNE"

Results = Mapping[str, Tensor]
Planner = Callable[[Results, Tile], Launch]
"""From where results go, and a tile, to the launch."""
Clock = Callable[[Callable[[], object]], float]
"""From work to its time; only the order of times matters."""

_WRITES = {
    "forward": ("o", "lse"),
    "one_pass": ("dk", "dv", "dq_sum"),
    "keys": ("dk", "dv"),
    "queries": ("dq",),
}


def tuner() -> Tuner | None:
    """Return what chooses tiles, or None where the table does.

    Raises: UsageError when the environment variable is neither 0 nor 1.
    """
    wanted = os.environ.get(VARIABLE) or "0"
    if wanted not in ("0", "1"):
        raise bad("attention", VARIABLE, "be 0 or 1", wanted)
    return _tuner() if wanted == "1" else None


@cache
def _tuner() -> Tuner:
    return Tuner(cache_path())


def gpu_ms(work: Callable[[], object]) -> float:
    """Return the median GPU time of a launch."""
    return do_bench(work, return_mode="median")


@dataclass
class Tuner:
    """Chooses tiles by time and remembers them, in `path` too."""

    path: Path
    clock: Clock = gpu_ms
    launch: Callable[[Launch], object] = Launch.run
    _known: dict[str, Any] | None = field(default=None, init=False)

    def tile(
        self, kernel: str, table: Tile, made: Results, plan: Planner,
        prepare: Callable[[Results], Launch] | None = None,
    ) -> Tile:  # fmt: skip
        """Return the tile to launch `kernel` with, measured if it is not known.

        `made` says what results look like and is not written to; `prepare` plans the kernel that
        must run on them first.
        """
        like = made[_WRITES[kernel][0]]
        if like.device.type == "cpu" and self.clock is gpu_ms:
            return table  # The interpreter's time says nothing about a GPU.
        facts = plan(made, table).arguments
        tiles = candidates(kernel, table, dtype=like.dtype, pad=facts["HEAD_PAD"], tma=facts["TMA"])
        key = _key(kernel, like, facts)
        if self._known is None:
            self._known = self._read()
        for tile in tiles:  # Never one that is not on the list, whatever the file says.
            if asdict(tile) == self._known.get(key):
                return tile
        if like.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return table
        try:
            best = self._fastest(kernel, tiles, made, plan, prepare)
        except torch.OutOfMemoryError:
            best = None
        if best is None:
            _warn(f"no tile of {kernel} could be measured on these inputs, the table's is used")
            return table
        self._keep(key, best)
        return best

    def _fastest(
        self, kernel: str, tiles: list[Tile], made: Results, plan: Planner,
        prepare: Callable[[Results], Launch] | None,
    ) -> Tile | None:  # fmt: skip
        """Return the fastest tile of those that run and agree with the first."""
        scratch = {
            name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
            for name, t in made.items()
        }

        def results(tile: Tile) -> dict[str, Tensor]:
            # What is left unwritten must not look right. Preparing clears the dQ buffer, to which
            # every timed run adds.
            for tensor in scratch.values():
                tensor.fill_(float("nan"))
            if prepare is not None:
                self.launch(prepare(scratch))
            self.launch(plan(scratch, tile))
            return {name: scratch[name] for name in _WRITES[kernel]}

        truth = {name: tensor.clone() for name, tensor in results(tiles[0]).items()}
        if not all(tensor.isfinite().all() for tensor in truth.values()):
            return None
        budget = _budget(made[_WRITES[kernel][0]].dtype, plan(scratch, tiles[0]).arguments)
        times: dict[Tile, float] = {}
        for tile in tqdm(tiles, desc=f"tuning {kernel}", unit="tile", leave=False):
            try:
                got = results(tile)
            except (TritonError, RuntimeError) as error:
                if not _does_not_compile(error):
                    raise
                continue
            if all(_agree(got[name], truth[name], budget) for name in got):
                times[tile] = self.clock(partial(self.launch, plan(scratch, tile)))
        return min(times, key=times.__getitem__, default=None)

    def _read(self) -> dict[str, Any]:
        try:
            return read(self.path)
        except UnreadableError as error:
            _warn(f"{self.path} is ignored: {error}")
            return {}

    def _keep(self, key: str, tile: Tile) -> None:
        """Remember a tile; add it to the file beside what others wrote there meanwhile."""
        self._known = {**(self._known or {}), key: asdict(tile)}
        try:
            self._known = merge(self.path, self._known)
        except OSError as error:
            _warn(f"tiles are measured but not kept: {error}")


def _key(kernel: str, like: Tensor, facts: Mapping[str, Any]) -> str:
    """Return what a tile's time depends on, as the file names it."""
    on_gpu = like.device.type == "cuda"
    parts = [
        torch.cuda.get_device_name(like.device) if on_gpu else like.device.type,
        f"triton {triton.__version__}",
        kernel,
        str(like.dtype).removeprefix("torch."),
        # Products in three parts, and loads without the accelerator, want other tiles.
        facts["PRECISION"],
        "tma" if facts["TMA"] else "no tma",
        f"head dim {facts['HEAD_PAD']}",
        "causal" if facts["CAUSAL"] else "full",
        f"queries <= {triton.next_power_of_2(facts['num_queries'])}",
        f"keys <= {triton.next_power_of_2(facts['num_keys'])}",
    ]
    return ", ".join(parts)


def _budget(dtype: torch.dtype, facts: Mapping[str, Any]) -> float:
    """Return what tiles may differ by, relative: roundings of P and O, and long sums' order."""
    unit = 2.0**-10 if facts["PRECISION"] == "tf32" else torch.finfo(dtype).eps
    terms = facts["num_queries"] + facts["num_keys"]
    return 4 * unit + 8 * torch.finfo(torch.float32).eps * terms**0.5


def _agree(got: Tensor, truth: Tensor, budget: float) -> bool:
    """Tell whether each row differs by little of its largest number and of the tensor's RMS."""
    size = truth.float().abs()
    allowed = budget * (size.amax(-1, keepdim=True) + size.square().mean().sqrt())
    return bool(((got.float() - truth.float()).abs() <= allowed).all())


def _does_not_compile(error: Exception) -> bool:
    """Tell a tile that Triton refuses from a fault of the device."""
    return isinstance(error, TritonError) or "PassManager::run failed" in str(error)


def _warn(what: str) -> None:
    warnings.warn(f"attention autotune: {what}", RuntimeWarning, stacklevel=3)
