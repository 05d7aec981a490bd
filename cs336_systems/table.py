"""Tables of named implementations: one row is enough to be tested, benchmarked and reported.

A row names where its function lives and what it needs; nothing is imported before the row is used,
so that a table can be listed on a machine where half of its rows cannot run.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cs336_systems.errors import unknown


@dataclass(frozen=True)
class Unmet:
    """Why a row cannot run here, in the words that a result table shows."""

    status: Literal["skipped", "not_installed"]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row: where the function is and what it takes to run it."""

    target: str
    """`module:function`."""
    summary: str
    """One line for lists and reports."""
    needs: tuple[str, ...] = ()
    """`cuda`, `sm_NN` (at least), `sm_NNa` (exactly), `triton` (a CUDA device or Triton's
    interpreter), `compiler` (a C++ compiler for torch.compile), `package:NAME`."""
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    """Element types it accepts."""
    head_dims: tuple[int, ...] = ()
    """Head dims it takes; empty for any."""
    peer: bool = False
    """Somebody else's implementation, here to be compared with."""

    def load(self) -> Callable[..., Any]:
        """Import and return the function.

        Raises: ImportError when a package it needs is missing.
        """
        module, name = self.target.split(":")
        return getattr(importlib.import_module(module), name)

    def unmet(
        self, *, device: str, dtype: str | None = None, head_dim: int | None = None
    ) -> Unmet | None:
        """Return why this row cannot run on `device` (`cpu` or `cuda`) with `dtype` and `head_dim`;
        None if it can."""
        for need in self.needs:
            if (missing := _unmet(need, device, dtype)) is not None:
                return missing
        if dtype is not None and dtype not in self.dtypes:
            return Unmet("skipped", f"takes {' and '.join(self.dtypes)}, not {dtype}")
        if head_dim is not None and self.head_dims and head_dim not in self.head_dims:
            takes = " and ".join(map(str, self.head_dims))
            return Unmet("skipped", f"takes head dims {takes}, not {head_dim}")
        return None


class Table(Mapping[str, Entry]):
    """A closed, ordered set of rows; asking for another name lists the names there are."""

    def __init__(self, name: str, rows: Mapping[str, Entry]) -> None:
        self.name = name
        self._rows = dict(rows)

    def __getitem__(self, key: str) -> Entry:
        if key not in self._rows:
            raise unknown(self.name, "row", self._rows, key)
        return self._rows[key]

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def has_compiler() -> bool:
    """Tell whether a C++ compiler is there for what `torch.compile` generates."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "c++", "clang++"))


def interpreting() -> bool:
    """Tell whether Triton kernels run in its interpreter on a CPU; fixed at their import."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _unmet(need: str, device: str, dtype: str | None) -> Unmet | None:
    kind, _, name = need.partition(":")
    if kind == "package":
        if _importable(name):
            return None
        return Unmet("not_installed", f"package {name} is not installed")
    if need == "compiler":
        return (
            None if has_compiler() else Unmet("skipped", "needs a C++ compiler, found none on PATH")
        )
    if need == "triton":
        return None if device == "cuda" else _unmet_by_interpreter(device, dtype)
    if device != "cuda":
        return Unmet("skipped", f"needs a CUDA device, runs on {device} here")
    if need.startswith("sm_"):
        return _unmet_capability(need.removeprefix("sm_"))
    if need != "cuda":
        raise unknown(
            "Entry", "needs", ("cuda", "sm_NN[a]", "triton", "compiler", "package:NAME"), need
        )
    return None


def _unmet_by_interpreter(device: str, dtype: str | None) -> Unmet | None:
    if not interpreting():
        return Unmet("skipped", f"needs a CUDA device, or TRITON_INTERPRET=1 to run on {device}")
    if dtype == "bf16":
        reason = "bf16 needs a CUDA device: Triton's interpreter computes it on raw bits"
        return Unmet("skipped", reason)
    return None


def _unmet_capability(wanted: str) -> Unmet | None:
    import torch

    major, minor = torch.cuda.get_device_capability()
    have, number = 10 * major + minor, int(wanted.removesuffix("a"))
    fits = have == number if wanted.endswith("a") else have >= number
    return None if fits else Unmet("skipped", f"needs sm_{wanted}, found sm_{have}")


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
