"""What the studies of fused attention run by default: rows, shapes and dtypes, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from attention_bench import DTYPES, Shape
from choices import at_least, listed, one_of

from cs336_systems.attention import ATTENTION
from cs336_systems.measure.record import Case

OURS = "flash_attention_"
"""What the names of this project's own fused rows begin with."""
ROUNDS = 100
HARNESS_REP_MS = 10_000
"""How long `do_bench` repeats the public harness's step."""
_FIXED_DTYPE = ("attention_harness", "attention_fp32")
"""Studies that --dtypes does not change."""

Option = Callable[[str], Any]
"""Returns the value of a command-line option, None where it was not given."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One study: every row at every dtype on every shape."""

    rows: tuple[str, ...]
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]


class Point(NamedTuple):
    """One pass of one row at one dtype on one shape."""

    attention: str
    dtype: str
    shape: Shape
    which: str

    def __str__(self) -> str:
        return "-".join(map(str, self)).replace(" ", "-")

    def case(self, study: str, **changes: Any) -> Case:
        """Return what is recorded of it, timed on the device's clock unless changed."""
        params = {"attention": self.attention, "shape": str(self.shape), "dtype": self.dtype}
        settings: dict[str, Any] = {
            "params": {**params, "pass": self.which, **self.shape._asdict()},
            "clock": "gpu_ms",
            "cache": "cold",
            "rounds": ROUNDS,
            "flops": self.shape.flops(self.which),
            "flops_dtype": self.dtype,
            "least_bytes": self.shape.least_bytes(self.which, self.dtype),
            "baseline": {"attention": "sdpa" if self.dtype == "fp32" else "sdpa_flash"},
        }
        return Case(study=study, **{**settings, **changes})


Grids = dict[str, Grid]
"""The grids by study."""


def gpu_grids() -> Grids:
    """Return the studies at their full size."""
    all_rows = tuple(ATTENTION)
    ours = (f"{OURS}triton", f"{OURS}hopper")
    fused = tuple(row for row in all_rows if row in ours or ATTENTION[row].peer)
    precise = ("scaled_dot_prod_attention", "scaled_dot_prod_attention_compiled", "sdpa", "flex")
    sizes = ((1, 16, 16384, 64), (8, 16, 2048, 64), (1, 16, 16384, 128), (8, 16, 2048, 128))
    both = tuple(Shape(*size, causal) for size in sizes for causal in (True, False))
    checked = tuple(Shape(2, 4, 1024, d, causal) for d in (64, 128) for causal in (True, False))
    sweep = sweep_shapes(tuple(2**power for power in range(7, 17)), (16, 32, 64, 128))
    return {
        "flash_sweep": Grid(rows=all_rows, shapes=sweep, dtypes=("bf16", "fp32")),
        "attention_shapes": Grid(
            rows=fused, shapes=(*both, Shape(1, 32, 32768, 128)), dtypes=("bf16",)
        ),
        "attention_harness": Grid(rows=fused, shapes=(Shape(1, 16, 16384, 64),), dtypes=("bf16",)),
        "attention_host_bound": Grid(
            rows=fused, shapes=(Shape(1, 1, 128, 64), Shape(1, 1, 1024, 64)), dtypes=("bf16",)
        ),
        "attention_fp32": Grid(
            rows=tuple(row for row in all_rows if row in precise or row == f"{OURS}triton"),
            shapes=(Shape(1, 16, 4096, 64),),
            dtypes=("fp32",),
        ),
        "attention_error": Grid(rows=all_rows, shapes=checked, dtypes=("bf16", "fp16", "fp32")),
    }


def cpu_grids() -> Grids:
    """Return the studies in seconds: the same rows but for compiled ones, on small shapes."""
    rows = tuple(row for row in ATTENTION if "compiler" not in ATTENTION[row].needs)
    fused = tuple(row for row in rows if row.startswith(OURS) or ATTENTION[row].peer)
    small = Grid(rows=fused, shapes=(Shape(1, 2, 256, 32),), dtypes=("fp32",))
    return {
        "flash_sweep": Grid(rows=rows, shapes=sweep_shapes((128, 256), (32,)), dtypes=("fp32",)),
        "attention_shapes": replace(
            small, shapes=(*small.shapes, Shape(1, 2, 256, 32, causal=False))
        ),
        "attention_harness": small,
        "attention_host_bound": replace(small, shapes=(Shape(1, 1, 64, 32),)),
        "attention_fp32": replace(small, rows=rows),
        "attention_error": replace(small, rows=rows, dtypes=("bf16", "fp32")),
    }


def smoke_grids() -> Grids:
    """Return one small case of each kind."""
    rows = tuple(
        row
        for row in ATTENTION
        if row == "sdpa" or (row.startswith(OURS) and "compiler" not in ATTENTION[row].needs)
    )
    grid = Grid(rows=rows, shapes=(Shape(1, 2, 64, 16),), dtypes=("fp32",))
    sweep = replace(grid, shapes=sweep_shapes((64,), (16,)))
    return {**dict.fromkeys(gpu_grids(), grid), "flash_sweep": sweep}


def sweep_shapes(seqs: tuple[int, ...], head_dims: tuple[int, ...]) -> tuple[Shape, ...]:
    """Return the course's shapes, batch 1 and one head, each head dim's lengths in order."""
    return tuple(Shape(1, 1, seq, d) for d in head_dims for seq in sorted(seqs))


def chosen_grids(option: Option, device: torch.device, *, smoke: bool) -> Grids:
    """Return the studies of fused attention, with what the command line chooses in place of
    their own.

    Raises: UsageError for a value that is not a choice.
    """
    grids = smoke_grids() if smoke else gpu_grids() if device.type == "cuda" else cpu_grids()
    sweep, named = grids["flash_sweep"], grids["attention_shapes"]
    seqs, head_dims = (
        listed(option(name), flag, sorted({getattr(shape, field) for shape in sweep.shapes}), parse)
        for name, flag, field, parse in (
            ("seqs", "--seqs", "seq", at_least("--seqs", 1)),
            ("head_dims", "--head-dims", "d", at_least("--head-dims", 1)),
        )
    )
    shapes = listed(option("shapes"), "--shapes", named.shapes, Shape.parse)
    grids["flash_sweep"] = replace(sweep, shapes=sweep_shapes(seqs, head_dims))
    grids["attention_shapes"] = replace(named, shapes=shapes)
    return {study: _narrowed(study, grid, option) for study, grid in grids.items()}


def _narrowed(study: str, grid: Grid, option: Option) -> Grid:
    rows = listed(option("rows"), "--rows", grid.rows, one_of("--rows", ATTENTION))
    if study in _FIXED_DTYPE:
        return replace(grid, rows=rows)
    dtypes = listed(option("dtypes"), "--dtypes", grid.dtypes, one_of("--dtypes", DTYPES))
    return replace(grid, rows=rows, dtypes=dtypes)
