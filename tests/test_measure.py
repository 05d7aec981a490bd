"""Device facts, conditions, operator counts and NVTX ranges."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import torch
from cs336_basics.nn_utils import softmax

from cs336_systems.config import preset
from cs336_systems.measure.counts import count_operators
from cs336_systems.measure.device import PEAKS, commit_facts, conditions, device_facts, pick_device
from cs336_systems.measure.memory import available_bytes, gib, peak_bytes
from cs336_systems.measure.profile import Ranges, annotated_attention
from cs336_systems.model import build_model

CPU = torch.device("cpu")


def test_cpu_facts() -> None:
    facts = device_facts("cpu")
    assert facts["kind"] == "cpu"
    assert facts["name"]
    assert facts["torch"] == torch.__version__
    assert facts["peak_flops"] is None
    assert conditions(CPU) == {}


@pytest.mark.gpu
def test_gpu_facts() -> None:
    facts = device_facts("cuda")
    assert facts["name"] == torch.cuda.get_device_name()
    assert facts["power_limit_w"] > 0
    assert facts["driver"]
    now = conditions(torch.device("cuda"))
    assert 0 < now["sm_clock_mhz"] <= facts["sm_clock_max_mhz"]
    assert isinstance(now["throttle"], str)


@pytest.mark.gpu
def test_peak_bytes_counts_what_the_call_held() -> None:
    device = torch.device("cuda")
    before = torch.cuda.memory_allocated(device)
    peak = peak_bytes(device, lambda: torch.empty(2**28, dtype=torch.uint8, device=device))
    assert peak is not None
    assert peak - before == 2**28


def test_peaks_are_ordered_as_hardware_is() -> None:
    for name, peak in PEAKS.items():
        assert peak["fp32"] < peak["tf32"] < peak["bf16"] == peak["fp16"], name
        assert 1e11 < peak["mem"] < 1e13, name


def test_device_is_the_gpu_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device(None).type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(None).type == "cpu"


def test_commit_facts(tmp_path: Path) -> None:
    assert commit_facts(tmp_path) is None

    def git(*args: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(
            ("git", "-C", str(tmp_path), *identity, *args), check=True, capture_output=True
        )

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    facts = commit_facts(tmp_path)
    assert facts is not None
    assert len(facts["id"]) == 40
    assert facts["dirty"] is False
    (tmp_path / "new").write_text("x")
    changed = commit_facts(tmp_path)
    assert changed is not None
    assert changed["dirty"] is True


def test_available_memory_is_known_here() -> None:
    available = available_bytes(CPU)
    assert available is None or available > 2**20
    assert gib(2**30 * 1.5) == "1.50 GiB"
    assert gib(None) == "an unknown amount"


def test_operators_are_counted_exactly() -> None:
    x = torch.randn(4, 4)

    def step() -> torch.Tensor:
        return x.add(x).mul(x)

    first = count_operators(CPU, step)
    assert first == {"operators": 2}
    assert count_operators(CPU, step) == first


@pytest.mark.gpu
def test_kernels_are_counted_exactly() -> None:
    x = torch.randn(4, 4, device="cuda")
    assert count_operators(x.device, lambda: x.add(x).mul(x)) == {"operators": 2, "kernels": 2}


class TestRanges:
    """NVTX ranges: nothing when off, named when on, undone afterwards."""

    @pytest.fixture
    def pushed(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        from contextlib import nullcontext

        names: list[str] = []

        def record(name: str) -> nullcontext[None]:
            names.append(name)
            return nullcontext()

        monkeypatch.setattr(torch.cuda.nvtx, "range", record)
        return names

    def test_off_is_one_shared_object(self, pushed: list[str]) -> None:
        ranges = Ranges(enabled=False)
        assert ranges("a") is ranges("b")
        assert pushed == []

    def test_off_costs_nothing_that_a_step_could_notice(self) -> None:
        ranges = Ranges(enabled=False)
        start = time.perf_counter()
        for _ in range(1000):
            with ranges("x"):
                pass
        assert time.perf_counter() - start < 0.05

    def test_on_names_the_parts_of_attention(self, pushed: list[str]) -> None:
        import cs336_basics.model as basics

        original = basics.scaled_dot_product_attention
        model = build_model(preset("debug", context_length=8))
        for layer in model.layers:
            layer.attn.attention_fn = None
        tokens = torch.zeros(1, 8, dtype=torch.long)
        expected = model(tokens)
        with annotated_attention(True, softmax):
            assert torch.equal(model(tokens), expected)
        parts = ["scaled dot product attention", "attention scores", "softmax", "final matmul"]
        assert pushed == parts * len(model.layers)
        assert basics.scaled_dot_product_attention is original

    def test_undone_after_an_error(self, pushed: list[str]) -> None:
        import cs336_basics.model as basics

        original = basics.scaled_dot_product_attention
        inside = []

        def fail_annotated() -> None:
            with annotated_attention(True, softmax):
                inside.append(basics.scaled_dot_product_attention)
                raise KeyError

        with pytest.raises(KeyError):
            fail_annotated()
        assert len(inside) == 1
        assert inside[0] is not original
        assert basics.scaled_dot_product_attention is original
