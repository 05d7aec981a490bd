"""The swept shapes, once: what each benchmark file runs by default, and what the command line
chooses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from all_reduce_cases import Grid as AllReduces
from all_reduce_cases import add_options as add_all_reduce_options
from all_reduce_cases import chosen_grid as chosen_all_reduces
from attention_bench import DTYPES
from choices import at_least, listed, one_of
from data_parallel_cases import Trainings, chosen_trainings
from data_parallel_cases import add_options as add_training_options
from flash_cases import HARNESS_REP_MS, Grids, chosen_grids
from lm_matrix_cases import Matrix, chosen_matrix
from lm_matrix_cases import add_options as add_matrix_options
from sweep_cases import Sweep, chosen_sweep
from sweep_cases import add_options as add_sweep_options

from cs336_systems.accounting import PASSES
from cs336_systems.attention import ATTENTION, DEFAULT_ATTENTION
from cs336_systems.config import PRESETS
from cs336_systems.errors import UsageError, bad
from cs336_systems.measure.pytest_plugin import session_of
from cs336_systems.measure.workload import NotMeasured
from cs336_systems.model import COMPILE_MODES
from cs336_systems.table import has_compiler

PRECISIONS = ("fp32", "tf32", "bf16")
"""fp32: every product in fp32. tf32: products may round inputs to tf32. bf16: autocast."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Every swept list of this run."""

    device: torch.device
    batch_size: int
    attention: str
    sizes: tuple[str, ...]
    contexts: tuple[int, ...]
    passes: tuple[str, ...]
    precisions: tuple[str, ...]
    compile_modes: tuple[str, ...]
    compiled_everywhere: bool
    """Else only at the last context in the first precision: a default run on a CPU has minutes,
    not hours."""
    warmups: tuple[int, ...]
    warmup_sizes: tuple[str, ...]
    rows: tuple[str, ...]
    seqs: tuple[int, ...]
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    flash: Grids
    harness_rep_ms: int
    all_reduce: AllReduces | None
    trainings: Trainings | None
    matrix: Matrix | None
    sweep: Sweep | None
    smoke: bool
    gate: bool
    nvtx: bool


def refuse_unmet(
    attention: str, device: torch.device, dtype: str, head_dim: int | None = None
) -> None:
    """Raise NotMeasured when an attention row cannot run here, or its time would mean nothing."""
    row = ATTENTION[attention]
    unmet = row.unmet(device=device.type, dtype=dtype, head_dim=head_dim)
    if unmet is not None:
        raise NotMeasured(unmet.status, f"{attention}: {unmet.reason}")
    if "triton" in row.needs and device.type != "cuda":
        raise NotMeasured("skipped", f"{attention}: not timed in Triton's interpreter")


def add_options(parser: pytest.Parser) -> None:
    """Register the options that choose cases."""
    group = parser.getgroup(
        "cs336-cases", "choosing cases (cs336-systems); lists are comma-separated"
    )
    group.addoption("--sizes", help=f"model presets: {', '.join(PRESETS)}")
    group.addoption("--contexts", help="context lengths in tokens, e.g. 128,256,512,1024")
    group.addoption("--passes", help=f"model passes: {', '.join(PASSES)}")
    group.addoption("--precisions", help=f"{', '.join(PRECISIONS)} (bf16: autocast)")
    group.addoption("--compile-modes", help=f"{', '.join(COMPILE_MODES)}")
    group.addoption(
        "--batch-size", type=int, default=4, help="sequences in a model batch (default: 4)"
    )
    group.addoption(
        "--attention",
        default=DEFAULT_ATTENTION,
        help=f"the models' attention: {', '.join(ATTENTION)}",
    )
    group.addoption("--warmups", help="warm-up study: numbers of warm-up steps, e.g. 0,1,2,5")
    group.addoption("--warmup-sizes", help="warm-up study: model presets")
    group.addoption("--rows", help=f"attention studies: rows of the table: {', '.join(ATTENTION)}")
    group.addoption("--seqs", help="attention grid and flash sweep: sequence lengths")
    group.addoption("--head-dims", help="attention grid and flash sweep: head dimensions")
    group.addoption("--dtypes", help=f"attention studies: {', '.join(DTYPES)}")
    group.addoption("--shapes", help="attention shapes: names like 'B1 H16 S16384 D64 causal'")
    group.addoption(
        "--harness-rep-ms",
        type=int,
        help=f"attention harness: do_bench's repetitions (default: {HARNESS_REP_MS})",
    )
    add_all_reduce_options(group)
    add_training_options(group)
    add_matrix_options(group)
    add_sweep_options(group)
    group.addoption("--smoke", action="store_true", help="a few cases of every file, in seconds")
    group.addoption(
        "--gate",
        action="store_true",
        help="the regression gate's cases: CPU, 1 ms or more, counted",
    )


def selection(config: pytest.Config) -> Selection:
    """Return what this run sweeps.

    Raises: pytest.UsageError, in one line, for a value that is not a choice.
    """
    try:
        return _selection(config)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error


def _selection(config: pytest.Config) -> Selection:
    option = config.getoption
    device = session_of(config).settings.device
    smoke, gate = option("smoke"), option("gate")
    if gate and device.type != "cpu":
        raise bad("benchmarks", "--gate", "be run with --device cpu", str(device))
    rep_ms = option("harness_rep_ms")
    if rep_ms is not None and rep_ms < 1:
        raise bad("benchmarks", "--harness-rep-ms", "be at least 1", rep_ms)
    if option("batch_size") < 1:
        raise bad("benchmarks", "--batch-size", "be at least 1", option("batch_size"))
    default = _gate_lists() if gate else _smoke_lists() if smoke else _default_lists(device)

    def names(option_name: str, key: str, choices: Iterable[str]) -> tuple[str, ...]:
        return listed(option(key), option_name, default[key], one_of(option_name, choices))

    def numbers(option_name: str, key: str, least: int) -> tuple[int, ...]:
        return listed(option(key), option_name, default[key], at_least(option_name, least))

    return Selection(
        device=device,
        batch_size=option("batch_size"),
        attention=one_of("--attention", ATTENTION)(option("attention")),
        sizes=names("--sizes", "sizes", PRESETS),
        contexts=numbers("--contexts", "contexts", 1),
        passes=names("--passes", "passes", PASSES),
        precisions=names("--precisions", "precisions", PRECISIONS),
        compile_modes=names("--compile-modes", "compile_modes", COMPILE_MODES),
        compiled_everywhere=device.type == "cuda" or option("compile_modes") is not None,
        warmups=numbers("--warmups", "warmups", 0),
        warmup_sizes=names("--warmup-sizes", "warmup_sizes", PRESETS),
        rows=names("--rows", "rows", ATTENTION),
        seqs=numbers("--seqs", "seqs", 1),
        head_dims=numbers("--head-dims", "head_dims", 1),
        dtypes=names("--dtypes", "dtypes", DTYPES),
        flash={} if gate else chosen_grids(option, device, smoke=smoke),
        all_reduce=None if gate else chosen_all_reduces(option, device, smoke=smoke),
        trainings=None if gate else chosen_trainings(option, device, smoke=smoke),
        matrix=None if gate else chosen_matrix(option, device, smoke=smoke),
        sweep=None if gate else chosen_sweep(option, device, smoke=smoke),
        harness_rep_ms=rep_ms or (100 if smoke else HARNESS_REP_MS),
        smoke=smoke,
        gate=gate,
        nvtx=option("nvtx"),
    )


def _default_lists(device: torch.device) -> dict[str, Sequence[Any]]:
    if device.type == "cuda":
        return _gpu_lists(torch.cuda.get_device_properties(device).total_memory)
    return {
        "sizes": ("tiny",),
        "contexts": (64, 128),
        "passes": PASSES,
        "precisions": ("fp32", "bf16"),
        "compile_modes": ("eager", "blocks") if has_compiler() else ("eager",),
        "warmups": (0, 1, 2, 5),
        "warmup_sizes": ("tiny",),
        "rows": tuple(ATTENTION),
        "seqs": (128, 256, 512),
        "head_dims": (64,),
        "dtypes": ("fp32",),
    }


def _gpu_lists(memory_bytes: int) -> dict[str, Sequence[Any]]:
    # A full fp32 step holds 16 bytes a weight; the list's last size is the last that has a chance.
    largest = sum(memory_bytes > need * 2**30 for need in (0, 12, 24, 48, 72))
    return {
        "sizes": ("small", "medium", "large", "xl", "2.7b")[:largest],
        "contexts": (128, 256, 512, 1024),
        "passes": PASSES,
        "precisions": ("fp32", "bf16"),
        "compile_modes": ("eager", "blocks"),
        "warmups": (0, 1, 2, 5),
        "warmup_sizes": ("small", "medium", "large")[:largest],
        "rows": tuple(ATTENTION),
        "seqs": (256, 1024, 4096, 8192, 16384),
        "head_dims": (16, 32, 64, 128),
        "dtypes": ("fp32", "bf16"),
    }


def _smoke_lists() -> dict[str, Sequence[Any]]:
    return {
        "sizes": ("debug",),
        "contexts": (32,),
        "passes": PASSES,
        "precisions": ("fp32", "bf16"),
        "compile_modes": ("eager",),
        "warmups": (0, 1),
        "warmup_sizes": ("debug",),
        "rows": ("scaled_dot_prod_attention", "vectorized_torch", "sdpa", "flash_attn_4"),
        "seqs": (64,),
        "head_dims": (16,),
        "dtypes": ("fp32",),
    }


def _gate_lists() -> dict[str, Sequence[Any]]:
    return {
        **_smoke_lists(),
        "sizes": ("tiny",),
        "contexts": (128,),
        "precisions": ("fp32",),
        "rows": ("scaled_dot_prod_attention", "vectorized_torch", "sdpa"),
        "seqs": (512,),
        "head_dims": (64,),
    }
