"""Launching a compiled kernel again past Triton's own Python.

Triton 3.6 describes every tensor of the tensor memory accelerator anew in each call, asks the
driver about every pointer and calls chains of hooks that are empty. On small inputs that takes
longer than the kernels. Here the arguments of a call are a list whose numbers are known from the
first one; descriptions are kept by address, and pointers are passed as the numbers they are.

It reaches into what Triton has compiled, so it is for the versions it was written for;
CS336_DIRECT_LAUNCH=0 leaves all launches to Triton.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor

KNOWN_TRITON = "3.6."
"""What its releases begin with whose insides we reach into: names change with every other."""
_SWITCH = "CS336_DIRECT_LAUNCH"
_MOST_PLACES = 256
"""Addresses whose descriptions are kept, of one argument."""
Encode = Callable[[int], Any]


class DirectLaunch(NamedTuple):
    """One compiled kernel with all its arguments but the tensors' addresses."""

    launch: Callable[..., Any]
    """Triton's compiled launcher."""
    stream: Callable[[], int]
    hooks: tuple[list[Any], list[Any]]
    """What Triton is to call before and after each launch; nothing, else this is not for us."""
    before: tuple[Any, ...]
    """Arguments before the stream: the grid."""
    after: tuple[Any, ...]
    """Those between the stream and the kernel's own."""
    arguments: list[Any]
    """The kernel's own, descriptors taken apart."""
    pointers: list[tuple[int, int]]
    """(index, place) of those that are the address of the tensor at this place."""
    descriptors: list[tuple[int, int, dict[int, Any], Encode]]
    """(index, place, known, encode) of those that describe it."""

    def run(self, addresses: Sequence[int]) -> bool:
        """Queue the kernel on tensors at these addresses; tells whether it has."""
        if self.hooks[0] or self.hooks[1]:
            return False
        arguments = self.arguments.copy()
        for index, place in self.pointers:
            arguments[index] = addresses[place]
        for index, place, known, encode in self.descriptors:
            address = addresses[place]
            described = known.get(address)
            if described is None:
                if len(known) >= _MOST_PLACES:
                    known.clear()
                described = known[address] = encode(address)
            arguments[index] = described
        self.launch(*self.before, self.stream(), *self.after, *arguments)
        return True


class _At:
    """Stands for a tensor where only its address is asked for, and keeps none alive."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def direct_launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: Sequence[Any],
    tensors: Sequence[tuple[int, int]],
    descriptors: Sequence[tuple[int, int]],
) -> DirectLaunch | None:
    """Return a compiled kernel's direct launch, or None where there is none.

    arguments: as `kernel[grid]` takes them; tensors and descriptors: (index, place) among them,
        whose tensors come later.
    """
    if os.environ.get(_SWITCH) == "0" or not triton.__version__.startswith(KNOWN_TRITON):
        return None
    from triton.backends.nvidia import driver

    launcher = kernel.run
    is_known = isinstance(launcher, driver.CudaLauncher)
    if not is_known or launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    launch: Callable[..., Any] = launcher.launch
    metas: Iterator[Any] = iter(())
    if descriptors:
        # Triton wraps its launcher in a function that takes descriptors apart.
        inner = inspect.getclosurevars(launch).nonlocals
        if not {"launcher", "tensordesc_meta"} <= inner.keys():
            return None
        launch, metas = inner["launcher"], iter(inner["tensordesc_meta"])
    addresses = dict(tensors)
    described = dict(descriptors)
    flat: list[Any] = []
    pointers: list[tuple[int, int]] = []
    encoders: list[tuple[int, int, dict[int, Any], Encode]] = []
    for index, value in enumerate(arguments):
        if index in addresses:
            pointers.append((len(flat), addresses[index]))
            flat.append(None)
        elif index in described:
            meta = next(metas)
            if meta is None:  # taken apart by the compiler, not by the accelerator
                return None
            encoders.append((len(flat), described[index], {}, _encoder(value, meta)))
            flat.extend((None, *value.shape, *value.strides))
        else:
            # Of a tensor that is always the same, which the caller keeps.
            flat.append(value.data_ptr() if isinstance(value, Tensor) else value)
    active, hooks = triton.runtime.driver.active, triton.knobs.runtime
    device = active.get_current_device()
    return DirectLaunch(
        launch=launch,
        stream=lambda: active.get_current_stream(device),
        hooks=(hooks.launch_enter_hook.calls, hooks.launch_exit_hook.calls),
        before=grid,
        after=(
            kernel.function,
            launcher.launch_cooperative_grid,
            launcher.launch_pdl,
            None,  # no scratch memory
            None,
            kernel.packed_metadata,
            None,  # nothing to tell hooks
            None,
            None,
        ),
        arguments=flat,
        pointers=pointers,
        descriptors=encoders,
    )


def _encoder(descriptor: Any, meta: Any) -> Encode:
    from triton.backends.nvidia import driver

    def encode(address: int) -> Any:
        there = copy.copy(descriptor)
        there.base = _At(address)
        return driver.make_tensordesc_arg(there, meta)[0]

    return encode
