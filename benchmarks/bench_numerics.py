"""Two short experiments on number formats: summing small values, and what autocast runs in which
dtype."""

from __future__ import annotations

from typing import Any

import torch
from cases import Selection
from torch import Tensor, nn

from cs336_systems.measure.pytest_plugin import GpuBenchmark
from cs336_systems.measure.record import Case
from cs336_systems.measure.workload import Workload

NUM_TERMS = 1000
TERM = 0.01
VARIANTS = {
    # name: (dtype of the sum, dtype of the term, is the term cast to the sum's dtype before adding)
    "fp32 sum of fp32": (torch.float32, torch.float32, False),
    "fp16 sum of fp16": (torch.float16, torch.float16, False),
    "fp32 sum of fp16": (torch.float32, torch.float16, False),
    "fp32 sum of fp16 cast to fp32": (torch.float32, torch.float16, True),
}
AUTOCAST_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def sweep_variants(chosen: Selection) -> tuple[str, list[Any]]:
    """All four ways, whatever is chosen; the gate times none of them."""
    return "variant", [] if chosen.gate else list(VARIANTS)


def sweep_autocast(chosen: Selection) -> tuple[str, list[Any]]:
    """Both half formats."""
    return "dtype", [] if chosen.gate else list(AUTOCAST_DTYPES)


SWEEPS = {"bench_accumulation": sweep_variants, "bench_autocast_dtypes": sweep_autocast}


def bench_accumulation(gpu_benchmark: GpuBenchmark, variant: str) -> None:
    """Add 0.01 a thousand times; the exact sum is 10."""
    case = Case(study="accumulation", params={"variant": variant}, rounds=3, warmup_rounds=1)

    def metrics() -> dict[str, float | None]:
        total = accumulate(variant)
        return {"result": total, "error": total - NUM_TERMS * TERM}

    def build() -> Workload:
        return Workload(step=lambda: accumulate(variant), metrics=metrics)

    gpu_benchmark(case, build=build)


def accumulate(variant: str) -> float:
    """Return the sum as one variant computes it, on the CPU as the problem states it."""
    sum_dtype, term_dtype, cast_first = VARIANTS[variant]
    total = torch.tensor(0, dtype=sum_dtype)
    for _ in range(NUM_TERMS):
        term = torch.tensor(TERM, dtype=term_dtype)
        total += term.to(sum_dtype) if cast_first else term
    return total.item()


class ToyModel(nn.Module):
    """Two linear layers around a layer norm, as the problem states it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, 10, bias=False)
        self.ln = nn.LayerNorm(10)
        self.fc2 = nn.Linear(10, out_features, bias=False)
        self.relu = nn.ReLU()
        self.seen: dict[str, str] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits and note each intermediate's dtype."""
        self.seen["parameters"] = _name(self.fc1.weight)
        x = self.fc1(x)
        self.seen["fc1 output"] = _name(x)
        x = self.ln(self.relu(x))
        self.seen["ln output"] = _name(x)
        x = self.fc2(x)
        self.seen["logits"] = _name(x)
        return x


def bench_autocast_dtypes(gpu_benchmark: GpuBenchmark, chosen: Selection, dtype: str) -> None:
    """Train the toy model under autocast and note which dtype each part came out in."""
    case = Case(study="autocast_dtypes", params={"autocast": dtype})

    def build() -> Workload:
        torch.manual_seed(0)
        model = ToyModel(16, 4).to(chosen.device)
        x = torch.randn(8, 16, device=chosen.device)
        targets = torch.randint(4, (8,), device=chosen.device)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(chosen.device.type, AUTOCAST_DTYPES[dtype]):
                loss = nn.functional.cross_entropy(model(x), targets)
            loss.backward()
            model.seen["loss"] = _name(loss)
            model.seen["gradients"] = _name(model.fc1.weight.grad)

        step()
        return Workload(step=step, facts=dict(model.seen))

    gpu_benchmark(case, build=build)


def _name(tensor: Tensor | None) -> str:
    assert tensor is not None
    return str(tensor.dtype).removeprefix("torch.")
