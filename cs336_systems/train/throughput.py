"""How fast training goes: tokens, model FLOPs and the share of what the device could do."""

from __future__ import annotations

import time

import torch

from cs336_systems.accounting import pass_flops
from cs336_systems.config import ModelConfig
from cs336_systems.measure.device import device_facts
from cs336_systems.train.config import TrainingConfig


def peak_flops(device: torch.device, precision: str, world_size: int) -> float | None:
    """Return the peak rate of all ranks' devices in FLOP/s, or None where it is not known."""
    rates = device_facts(device.type)["peak_flops"]
    if rates is None:
        return None
    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    return float(rates[precision]) * world_size


class Throughput:
    """Turns steps into rates; read it only where the device has caught up with the host."""

    def __init__(
        self,
        model: ModelConfig,
        training: TrainingConfig,
        device: torch.device,
        *,
        earlier_seconds: float = 0.0,
    ) -> None:
        self._tokens = training.batch_size * model.context_length
        context = model.context_length
        self._flops = pass_flops(model, training.batch_size, context, "full_step") or 0.0
        self._peak = peak_flops(device, training.precision, training.num_ranks)
        self._begin = time.perf_counter() - earlier_seconds
        self.restart()

    @property
    def seconds(self) -> float:
        """Time since the run began, without the pauses between its processes."""
        return time.perf_counter() - self._begin

    def restart(self) -> None:
        """Begin to count here, after what is no training."""
        self._since, self._num_steps = time.perf_counter(), 0

    def stepped(self) -> None:
        """Count a step."""
        self._num_steps += 1

    def rates(self) -> dict[str, float | None]:
        """Return the rates of the steps since the last restart, of which there must be one."""
        step_s = (time.perf_counter() - self._since) / self._num_steps
        flops_per_s = self._flops / step_s
        return {
            "tokens_per_s": self._tokens / step_s,
            "tflops": flops_per_s / 1e12,
            "share_of_peak": None if self._peak is None else flops_per_s / self._peak,
            "seconds": self.seconds,
        }
