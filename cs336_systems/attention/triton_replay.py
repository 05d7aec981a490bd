"""Running planned kernels, and running them again on other tensors without planning."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cs336_systems.attention.triton_direct import DirectLaunch, direct_launch
from cs336_systems.attention.triton_launch import Launch


@dataclass(frozen=True)
class Plan:
    """Kernels in order, on given inputs, into given results."""

    launches: list[Launch]
    inputs: Mapping[str, Tensor]
    results: dict[str, Tensor]
    """Outputs and scratch."""

    def run(self, shapes: Sequence[torch.Size]) -> Replay | None:
        """Queue the kernels; return what repeats them, or None in Triton's interpreter.

        Its first results then have these shapes.
        """
        compiled = [launch.run() for launch in self.launches]
        if any(kernel is None for kernel in compiled):
            return None
        tensors = (*self.inputs.values(), *self.results.values())
        places = {id(tensor): place for place, tensor in enumerate(tensors)}
        steps = [
            _Step.of(kernel, launch, places)
            for kernel, launch in zip(compiled, self.launches, strict=True)
        ]
        made = list(self.results.values())
        for place, shape in enumerate(shapes):
            made[place] = made[place].view(shape)
        device = tensors[0].device
        index = device.index if device.type == "cuda" else None
        return Replay(steps, [_Memory.of(tensor) for tensor in made], device, index)


@dataclass(frozen=True)
class Replay:
    """Compiled kernels with all their arguments but the tensors."""

    steps: list[_Step]
    results: list[_Memory]
    device: torch.device
    index: int | None
    """Of a CUDA device."""
    after: dict[Any, Replay] = field(default_factory=dict)
    """Of a forward pass: the backward passes that followed it on the same tensors."""

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Queue the kernels on other inputs like those planned with, in the plan's order; return
        new results."""
        if self.index is not None and self.index != torch.cuda.current_device():
            with torch.cuda.device(self.index):
                return self._run(inputs)
        return self._run(inputs)

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        empty, device = torch.empty_strided, self.device
        made = [
            empty(shape, strides, dtype=dtype, device=device)
            for shape, strides, dtype in self.results
        ]
        tensors = (*inputs, *made)
        addresses: list[int] = []
        for step in self.steps:
            if step.direct is not None:
                addresses = addresses or [tensor.data_ptr() for tensor in tensors]
                if step.direct.run(addresses):
                    continue
            step.run(tensors)
        return made


class _Memory(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Memory:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)


class _Step(NamedTuple):
    """One compiled kernel: its arguments, and where tensors belong among them."""

    launch: Any
    arguments: list[Any]
    tensors: list[tuple[int, int]]
    descriptors: list[tuple[int, int]]
    direct: DirectLaunch | None

    @classmethod
    def of(cls, kernel: Any, launch: Launch, places: Mapping[int, int]) -> _Step:
        names = [parameter.name for parameter in launch.kernel.params]
        arguments = [launch.arguments[name] for name in names]
        tensors, descriptors = [], []
        for index, value in enumerate(arguments):
            if names[index] in launch.constants:
                continue
            if hasattr(value, "block_shape"):  # a descriptor, Triton's or Gluon's
                descriptors.append((index, places[id(value.base)]))
                arguments[index] = _without_base(value)
            elif isinstance(value, Tensor):
                tensors.append((index, places[id(value)]))
                arguments[index] = None
        grid = (launch.num_programs, 1, 1)
        # Makes the kernel's handle, which the direct launch needs.
        run = kernel[grid]
        direct = direct_launch(kernel, grid, arguments, tensors, descriptors)
        return cls(run, arguments, tensors, descriptors, direct)

    def run(self, tensors: Sequence[Tensor]) -> None:
        arguments = list(self.arguments)
        for index, place in self.tensors:
            arguments[index] = tensors[place]
        for index, place in self.descriptors:
            descriptor = copy.copy(arguments[index])
            descriptor.base = tensors[place]
            arguments[index] = descriptor
        self.launch(*arguments)


def _without_base(descriptor: Any) -> Any:
    """Return a copy that keeps no tensor alive."""
    bare = copy.copy(descriptor)
    bare.base = None
    return bare
