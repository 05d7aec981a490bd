"""Running planned kernels, and running them again on other tensors without planning."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cs336_systems.attention.triton_launch import Launch


@dataclass(frozen=True)
class Plan:
    """Kernels in order, on given inputs, into given results."""

    launches: list[Launch]
    inputs: Mapping[str, Tensor]
    results: dict[str, Tensor]
    """Outputs and scratch."""

    def run(self) -> Replay | None:
        """Queue the kernels; return what repeats them, or None in Triton's interpreter."""
        compiled = [launch.run() for launch in self.launches]
        if any(kernel is None for kernel in compiled):
            return None
        names = {id(tensor): name for name, tensor in (*self.inputs.items(), *self.results.items())}
        steps = [
            _Step.of(kernel, launch, names)
            for kernel, launch in zip(compiled, self.launches, strict=True)
        ]
        results = {name: _Memory.of(tensor) for name, tensor in self.results.items()}
        return Replay(steps, results, next(iter(self.inputs.values())).device)


@dataclass(frozen=True)
class Replay:
    """Compiled kernels with all their arguments but the tensors."""

    steps: list[_Step]
    results: dict[str, _Memory]
    device: torch.device

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Queue the kernels on other inputs like those planned with; return new results."""
        made = {name: memory.allocate(self.device) for name, memory in self.results.items()}
        tensors = {**inputs, **made}
        for step in self.steps:
            step.run(tensors)
        return made


class _Memory(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Memory:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def allocate(self, device: torch.device) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)


class _Step(NamedTuple):
    """One compiled kernel: its arguments, and where tensors belong among them."""

    launch: Any
    arguments: list[Any]
    tensors: list[tuple[int, str]]
    descriptors: list[tuple[int, str]]

    @classmethod
    def of(cls, kernel: Any, launch: Launch, names: Mapping[int, str]) -> _Step:
        arguments = [launch.arguments[parameter.name] for parameter in launch.kernel.params]
        tensors, descriptors = [], []
        for index, value in enumerate(arguments):
            if hasattr(value, "block_shape"):  # a descriptor, Triton's or Gluon's
                descriptors.append((index, names[id(value.base)]))
                arguments[index] = _without_base(value)
            elif isinstance(value, Tensor):
                tensors.append((index, names[id(value)]))
                arguments[index] = None
        grid = (launch.num_programs, 1, 1)
        return cls(kernel[grid], arguments, tensors, descriptors)

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        arguments = list(self.arguments)
        for index, name in self.tensors:
            arguments[index] = tensors[name]
        for index, name in self.descriptors:
            descriptor = copy.copy(arguments[index])
            descriptor.base = tensors[name]
            arguments[index] = descriptor
        self.launch(*arguments)


def _without_base(descriptor: Any) -> Any:
    """Return a copy that keeps no tensor alive."""
    bare = copy.copy(descriptor)
    bare.base = None
    return bare
