"""A very large model on many devices: what its state takes, and from which batch on devices work
rather than wait.

The model is a stack of blocks, each two linear layers, d_model -> d_ff -> d_model; nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cs336_systems.errors import bad

FP32_BYTES = 4
BF16_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The model; the numbers are the course's."""

    d_model: int = 16384
    d_ff: int = 53248
    num_blocks: int = 126

    @property
    def num_parameters(self) -> int:
        """Weights of all blocks."""
        return 2 * self.d_model * self.d_ff * self.num_blocks

    @property
    def master_bytes(self) -> int:
        """The weights in fp32."""
        return FP32_BYTES * self.num_parameters

    @property
    def gradient_bytes(self) -> int:
        """The accumulated gradients in fp32."""
        return FP32_BYTES * self.num_parameters

    @property
    def optimizer_bytes(self) -> int:
        """AdamW's two moments in fp32."""
        return 2 * FP32_BYTES * self.num_parameters

    @property
    def state_bytes(self) -> int:
        """All that is there between steps: 16 bytes a weight."""
        return self.master_bytes + self.gradient_bytes + self.optimizer_bytes

    def activation_bytes(self, num_tokens: float) -> float:
        """Return what is saved for the backward pass, in bf16: the input of every linear layer."""
        return BF16_BYTES * num_tokens * self.num_blocks * (self.d_model + self.d_ff)

    def sharded_bytes(
        self, num_devices: int, num_tokens: float, sharded_activations: float = 0.5
    ) -> float:
        """Return what a device holds where the state and a share of the activations are sharded.

        Cost: (state + a A) / n + (1 - a) A, for activations A of which the share a is sharded.
        """
        activations = self.activation_bytes(num_tokens)
        sharded = self.state_bytes + sharded_activations * activations
        return sharded / num_devices + (1 - sharded_activations) * activations

    def least_devices(
        self, device_bytes: float, num_tokens: float = 0, sharded_activations: float = 0.5
    ) -> int:
        """Return the smallest number of devices on each of which its part fits.

        Source: `sharded_bytes` solved for n.
        Raises: UsageError where the activations that are not sharded alone fill a device.
        """
        activations = self.activation_bytes(num_tokens)
        room = device_bytes - (1 - sharded_activations) * activations
        if room <= 0:
            rule = f"leave room on a device of {device_bytes:g} bytes"
            raise bad("least_devices", "num_tokens", rule, num_tokens)
        return math.ceil((self.state_bytes + sharded_activations * activations) / room)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices in a grid, FSDP along one side and tensor parallelism along the other.

    Links of the two sides are separate, so that both communicate at once. A side may span several
    axes of the machine's torus, each with links of its own. The numbers are the course's.
    """

    fsdp: int = 16
    """X."""
    tensor: int = 4
    """Y."""
    bytes_per_s: float = 2 * 9e10
    """W: over one axis' links, both ways together."""
    flops_per_s: float = 4.6e14
    """C: of one device."""
    fsdp_axes: int = 2
    """M_X."""
    tensor_axes: int = 1
    """M_Y."""

    @property
    def num_devices(self) -> int:
        """N = X Y."""
        return self.fsdp * self.tensor

    def compute_seconds(self, stack: Stack, num_tokens: float) -> float:
        """Return the time of one block's products, forward: 4 B D F / (N C)."""
        flops = 4.0 * num_tokens * stack.d_model * stack.d_ff
        return flops / (self.num_devices * self.flops_per_s)

    def weight_seconds(self, stack: Stack) -> float:
        """Return the time to gather one block's weights along X: 4 D F / (Y W M_X).

        Source: Austin et al., "How to Scale Your Model", part 5. The part that a device has already
            is not taken off: (X - 1) / X counts as 1.
        """
        num_bytes = BF16_BYTES * 2 * stack.d_model * stack.d_ff / self.tensor
        return num_bytes / (self.bytes_per_s * self.fsdp_axes)

    def activation_seconds(self, stack: Stack, num_tokens: float) -> float:
        """Return the time for one block's activations along Y: 4 B D / (X W M_Y).

        The input is gathered before the first product, the output scattered after the second.
        Source: as above.
        """
        num_bytes = 2 * BF16_BYTES * num_tokens * stack.d_model / self.fsdp
        return num_bytes / (self.bytes_per_s * self.tensor_axes)

    def is_compute_bound(self, stack: Stack, num_tokens: float) -> bool:
        """Tell whether a block's communication takes no longer than its products."""
        communication = max(self.weight_seconds(stack), self.activation_seconds(stack, num_tokens))
        return communication <= self.compute_seconds(stack, num_tokens)

    @property
    def least_tokens_per_device(self) -> float:
        """The batch per device from which on gathering weights is hidden: B / N = C / (Y W M_X).

        Source: `weight_seconds` = `compute_seconds`. Activations are hidden at every batch or at
            none: see `most_tensor`.
        """
        return self.flops_per_s / (self.tensor * self.bytes_per_s * self.fsdp_axes)

    def most_tensor(self, stack: Stack) -> float:
        """Return up to which Y activations are hidden: F W M_Y / C.

        Source: `activation_seconds` = `compute_seconds`, from which the batch cancels.
        """
        return stack.d_ff * self.bytes_per_s * self.tensor_axes / self.flops_per_s

    def least_tokens_at_any_split(self, stack: Stack) -> float:
        """Return the batch per device below which no division into X and Y is compute-bound:
        (C / W)^2 / (M_X M_Y F).

        Source: `least_tokens_per_device` at the largest Y of `most_tensor`.
        """
        intensity = self.flops_per_s / self.bytes_per_s
        return intensity**2 / (self.fsdp_axes * self.tensor_axes * stack.d_ff)


LOWER_THE_BATCH = (
    "more tensor parallelism, as far as activations stay hidden: the batch per device falls as 1/Y",
    "weights that travel in fp8: half the bytes, half the batch",
    "weights gathered once for several micro-batches (ZeRO stage 1 or 2), where memory allows",
    "pipeline parallelism over the blocks: weights stay, only activations between stages travel",
)
"""What makes a smaller batch compute-bound, in words."""
