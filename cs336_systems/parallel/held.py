"""What a rank holds, counted on the live objects: parameters, gradients, optimizer state, and what
is there to communicate.

Memory is counted as storages, each once and as a whole: a view adds nothing to what it is a view
of, and padding belongs to the tensors that it lies between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from cs336_systems.errors import bad
from cs336_systems.parallel.bucket import Bucket

_PACKAGE = "cs336_systems.parallel"


@dataclass(frozen=True, kw_only=True)
class HeldBytes:
    """Bytes on one device by what they are for; a storage with two uses counts as the first."""

    parameters: int
    gradients: int
    optimizer_state: int
    buffers: int
    """The module's own: running statistics and caches."""
    communication: int
    """What the strategy keeps beside all that: copies in another dtype, gathered weights."""
    activations: int | None
    """What is left of a measured peak; with it come temporary tensors of any kind."""

    @property
    def known(self) -> int:
        """Return all but activations."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer_state
            + self.buffers
            + self.communication
        )


def held_bytes(
    model: nn.Module, optimizer: Optimizer | None = None, *, peak_bytes: int | None = None
) -> HeldBytes:
    """Count what a wrapped or plain module and its optimizer hold on the module's device.

    peak_bytes: the most that was in use, of which activations are what remains.
    A peer's wrapper keeps buffers where Python does not see them: they count as activations.
    Raises: UsageError for a peak below what is held by now.
    """
    parameters = list(model.parameters())
    own = list(_reachable([vars(model), *([] if optimizer is None else [vars(optimizer)])]))
    bucketed = [found.flat for found in own if isinstance(found, Bucket)]
    kinds: dict[str, Iterable[Tensor]] = {
        "parameters": parameters,
        "gradients": [*(p.grad for p in parameters if p.grad is not None), *bucketed],
        "optimizer_state": [] if optimizer is None else _tensors(optimizer.state.values()),
        "buffers": model.buffers(),
        "communication": (found for found in own if isinstance(found, Tensor)),
    }
    counted: set[int] = set()
    device = next(model.parameters()).device
    sizes = {kind: _count(tensors, device, counted) for kind, tensors in kinds.items()}
    activations = None if peak_bytes is None else peak_bytes - sum(sizes.values())
    if activations is not None and activations < 0:
        raise bad("held_bytes", "peak_bytes", f"be at least the {sum(sizes.values())} that are "
                  "held", peak_bytes)  # fmt: skip
    return HeldBytes(**sizes, activations=activations)


def _count(tensors: Iterable[Tensor], device: torch.device, counted: set[int]) -> int:
    """Add up the storages that are not among `counted`, and put them there."""
    total = 0
    for found in tensors:
        # Of a distributed tensor a rank holds its part.
        tensor = found.to_local() if isinstance(found, DTensor) else found
        storage = tensor.untyped_storage()
        if tensor.device == device and storage.nbytes() and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    return (found for found in _reachable(values) if isinstance(found, Tensor))


def _reachable(values: Iterable[Any]) -> Iterator[Tensor | Bucket]:
    """Yield the tensors and buckets in containers and in objects of this package, at any depth.

    Objects of other packages are not looked into: a process group or a stream leads anywhere.
    """
    waiting, seen = list(values), set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor | Bucket):
            yield value
        if isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif not isinstance(value, type) and type(value).__module__.startswith(_PACKAGE):
            waiting.append(getattr(value, "__dict__", {}))
