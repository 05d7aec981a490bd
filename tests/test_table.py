"""Tables: rows load lazily, unknown names list the choices, unmet needs say what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cs336_systems import table as table_module
from cs336_systems.errors import UsageError
from cs336_systems.table import Entry, Table, Unmet

TABLE = Table("things", {"path": Entry(target="os.path:join", summary="joins")})


def test_row_loads_its_function() -> None:
    import os.path

    assert TABLE["path"].load() is os.path.join
    assert list(TABLE) == ["path"]
    assert "path" in TABLE
    assert "other" not in TABLE


def test_unknown_row_lists_the_rows() -> None:
    with pytest.raises(UsageError, match=r"^things: row must be one of path, got 'other'$"):
        TABLE["other"]


@pytest.mark.parametrize(
    ("entry", "device", "expected"),
    [
        (
            Entry(target="", summary="", needs=("cuda",)),
            "cpu",
            "needs a CUDA device, runs on cpu here",
        ),
        (
            Entry(target="", summary="", needs=("sm_90",)),
            "cpu",
            "needs a CUDA device, runs on cpu here",
        ),
        (Entry(target="", summary="", dtypes=("bf16",)), "cpu", "takes bf16, not fp32"),
        (
            Entry(target="", summary="", head_dims=(64, 128)),
            "cpu",
            "takes head dims 64 and 128, not 32",
        ),
    ],
)
def test_unmet_needs_are_skips(entry: Entry, device: str, expected: str) -> None:
    assert entry.unmet(device=device, dtype="fp32", head_dim=32) == Unmet("skipped", expected)


@pytest.mark.parametrize("package", ["surely_not_here", "surely.not.here", "os.surely_not_here"])
def test_missing_package_is_not_installed(package: str) -> None:
    entry = Entry(target="", summary="", needs=(f"package:{package}", "cuda"))
    assert entry.unmet(device="cpu") == Unmet(
        "not_installed", f"package {package} is not installed"
    )


def test_met_needs_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "has_compiler", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    entry = Entry(
        target="", summary="", needs=("package:torch", "compiler", "cuda", "sm_80", "sm_90a")
    )
    assert entry.unmet(device="cuda", dtype="bf16") is None


def test_too_old_a_gpu_and_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "has_compiler", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    unmet = Entry(target="", summary="", needs=("sm_80",)).unmet(device="cuda")
    assert unmet == Unmet("skipped", "needs sm_80, found sm_75")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    unmet = Entry(target="", summary="", needs=("sm_90a",)).unmet(device="cuda")
    assert unmet == Unmet("skipped", "needs sm_90a, found sm_100")
    unmet = Entry(target="", summary="", needs=("compiler",)).unmet(device="cpu")
    assert unmet == Unmet("skipped", "needs a C++ compiler, found none on PATH")


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry(target="", summary="", needs=("triton",))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    unmet = entry.unmet(device="cpu")
    assert unmet == Unmet("skipped", "needs a CUDA device, or TRITON_INTERPRET=1 to run on cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert entry.unmet(device="cpu", dtype="fp16") is None
    unmet = entry.unmet(device="cpu", dtype="bf16")
    assert unmet is not None
    assert unmet.reason == "bf16 needs a CUDA device: Triton's interpreter computes it on raw bits"


def test_misspelt_need_is_an_error() -> None:
    with pytest.raises(UsageError, match="Entry: needs must be one of"):
        Entry(target="", summary="", needs=("gpu",)).unmet(device="cuda")


def test_listing_the_attention_table_imports_no_implementation() -> None:
    code = (
        "import sys; from cs336_systems.attention import ATTENTION; list(ATTENTION.items());"
        "bad = [m for m in sys.modules if m.startswith(('triton', 'cs336_systems.attention.'))"
        " and not m.endswith('.arguments')];"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
