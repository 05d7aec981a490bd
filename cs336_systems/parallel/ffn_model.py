"""A gated feed-forward layer on n devices, in closed form: products, messages, and how many devices
are worth having.

The layer has three matrices: d_model -> d_ff twice, d_ff -> d_model. Its backward pass has twice
the products. Messages are in bf16, collectives are rings, and each overlaps with the products of
the same pass, so that a pass takes the longer of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

BF16_BYTES = 2
# What is equal on paper may come out a rounding apart.
_ROUNDING = 1 + 1e-12


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The layer and the batch that all devices share; the widths are the course's."""

    num_tokens: int
    """B."""
    d_model: int = 16384
    """D."""
    d_ff: int = 53248
    """F."""

    @property
    def forward_flops(self) -> float:
        """6 B D F: three matrices, two FLOPs a token and weight."""
        return 6.0 * self.num_tokens * self.d_model * self.d_ff

    @property
    def weight_bytes(self) -> int:
        """6 D F: three matrices in bf16."""
        return 3 * BF16_BYTES * self.d_model * self.d_ff

    @property
    def output_bytes(self) -> int:
        """2 B D: what goes in or comes out, in bf16."""
        return BF16_BYTES * self.num_tokens * self.d_model


@dataclass(frozen=True, kw_only=True)
class Device:
    """One of the devices; the numbers are the course's."""

    flops_per_s: float = 4.6e14
    """C."""
    bytes_per_s: float = 2 * 9e10
    """W: at which a rank's part in a ring travels."""

    @property
    def intensity(self) -> float:
        """C / W: the FLOPs that a device does while a byte travels."""
        return self.flops_per_s / self.bytes_per_s


class Pass(NamedTuple):
    """One pass on one device."""

    flops: float
    num_bytes: float
    """What the device sends."""

    def compute_seconds(self, device: Device) -> float:
        """Return the time of the products."""
        return self.flops / device.flops_per_s

    def communication_seconds(self, device: Device) -> float:
        """Return the time of the messages."""
        return self.num_bytes / device.bytes_per_s

    def is_compute_bound(self, device: Device) -> bool:
        """Tell whether the messages take no longer than the products."""
        return self.num_bytes * device.intensity <= self.flops * _ROUNDING


class Passes(NamedTuple):
    """A layer's part of a training step, on one device."""

    forward: Pass
    backward: Pass

    def is_compute_bound(self, device: Device) -> bool:
        """Tell whether both passes are."""
        return all(each.is_compute_bound(device) for each in self)


def _sent(num_bytes: float, num_devices: int) -> float:
    """Return what a rank sends in a ring all-gather or reduce-scatter of so many bytes."""
    return num_bytes * (num_devices - 1) / num_devices


def data_parallel(layer: Layer, num_devices: int) -> Passes:
    """Each device has the whole layer and 1/n of the batch.

    Cost: forward sends nothing; backward all-reduces the weights' gradients, 12 D F (n - 1) / n.
    """
    flops = layer.forward_flops / num_devices
    return Passes(Pass(flops, 0.0), Pass(2 * flops, 2 * _sent(layer.weight_bytes, num_devices)))


def fsdp(layer: Layer, num_devices: int) -> Passes:
    """Each device has 1/n of the weights and of the batch.

    Cost: forward all-gathers the weights, 6 D F (n - 1) / n; backward does so again and
    reduce-scatters their gradients. Half as many bytes again as data parallelism.
    """
    flops = layer.forward_flops / num_devices
    gathered = _sent(layer.weight_bytes, num_devices)
    return Passes(Pass(flops, gathered), Pass(2 * flops, 2 * gathered))


def tensor_parallel(layer: Layer, num_devices: int) -> Passes:
    """Each device has 1/n of d_ff of all three matrices, and the whole batch.

    Cost: an all-reduce of the outputs, forward, and of the inputs' gradients, backward:
    4 B D (n - 1) / n each.
    Source: Shoeybi et al., "Megatron-LM", section 3.
    """
    flops = layer.forward_flops / num_devices
    reduced = 2 * _sent(layer.output_bytes, num_devices)
    return Passes(Pass(flops, reduced), Pass(2 * flops, reduced))


def fsdp_and_tensor(layer: Layer, num_fsdp: int, num_tensor: int) -> Passes:
    """A grid: FSDP over X devices of layers of which tensor parallelism has cut 1/Y.

    Cost: FSDP's messages are of 1/Y of the weights, tensor parallelism's of 1/X of the batch. All
    go over the same links, one after the other; over links of their own (`scale_model.Mesh`) each
    kind is hidden or not by itself, up to the X of `most_devices_fsdp` and the Y of
    `most_devices_tensor`.
    """
    flops = layer.forward_flops / (num_fsdp * num_tensor)
    gathered = _sent(layer.weight_bytes, num_fsdp) / num_tensor
    reduced = 2 * _sent(layer.output_bytes, num_tensor) / num_fsdp
    return Passes(Pass(flops, gathered + reduced), Pass(2 * flops, 2 * gathered + reduced))


def most_devices_data_parallel(layer: Layer, device: Device) -> int:
    """Return the largest compute-bound n: B W / C + 1.

    Source: backward, 12 D F (n - 1) / (n W) <= 12 B D F / (n C).
    """
    return _whole(layer.num_tokens / device.intensity + 1)


def most_devices_fsdp(layer: Layer, device: Device) -> int:
    """Return the largest compute-bound n: B W / C + 1, as for data parallelism.

    Source: forward, 6 D F (n - 1) / (n W) <= 6 B D F / (n C); backward, twice both sides.
    """
    return _whole(layer.num_tokens / device.intensity + 1)


def most_devices_tensor(layer: Layer, device: Device) -> int:
    """Return the largest compute-bound n: 3 F W / (2 C) + 1, whatever the batch.

    Source: forward, 4 B D (n - 1) / (n W) <= 6 B D F / (n C); backward has twice the products.
    """
    return _whole(1.5 * layer.d_ff / device.intensity + 1)


DIVISIONS: dict[str, tuple[Callable[[Layer, int], Passes], Callable[[Layer, Device], int]]] = {
    "data parallel": (data_parallel, most_devices_data_parallel),
    "fsdp": (fsdp, most_devices_fsdp),
    "tensor parallel": (tensor_parallel, most_devices_tensor),
}
"""What n devices may each have a part of, with its passes and the most devices."""


class Grid(NamedTuple):
    """A division of devices; not of whole ones, where it is an optimum on paper."""

    fsdp: float
    tensor: float

    @property
    def num_devices(self) -> float:
        """X Y."""
        return self.fsdp * self.tensor


def best_grid(layer: Layer, device: Device) -> Grid:
    """Return the compute-bound grid with most devices, about 3 B F (W / C)^2 / 8 of them.

    Source: forward, times X Y W / D: 6 F (X - 1) + 4 B (Y - 1) <= 6 B F W / C. The product X Y
        under a bound on a X + b Y is largest where the bound is reached and both terms are equal.
    """
    per_fsdp, per_tensor = 6.0 * layer.d_ff, 4.0 * layer.num_tokens
    bound = per_fsdp * layer.num_tokens / device.intensity + per_fsdp + per_tensor
    fsdp_side, tensor_side = bound / (2 * per_fsdp), bound / (2 * per_tensor)
    # A side of less than one device is one device, and all of the bound is the other's.
    if fsdp_side < 1:
        return Grid(1, (bound - per_fsdp) / per_tensor)
    if tensor_side < 1:
        return Grid((bound - per_tensor) / per_fsdp, 1)
    return Grid(fsdp_side, tensor_side)


def _whole(devices: float) -> int:
    return math.floor(devices * _ROUNDING)
