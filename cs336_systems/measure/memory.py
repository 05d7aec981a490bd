"""Device memory: peaks, what autograd keeps for the backward pass, and reading an out-of-memory
error."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

_UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_CUDA_REQUEST = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|B|KiB|MiB|GiB|TiB)")
_CPU_REQUEST = re.compile(r"you tried to allocate (\d+) bytes")


def release(device: torch.device) -> None:
    """Give back what the previous case left: cycles that hold tensors, then the caching allocator's
    blocks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(device: torch.device, closure: Callable[[], object]) -> int | None:
    """Run `closure` once and return the most device memory in use meanwhile.

    What was there before is included. torch counts allocations only for CUDA devices; elsewhere
    the answer is None.
    """
    if device.type != "cuda":
        closure()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    closure()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def saved_bytes(closure: Callable[[], object], exclude: Iterable[torch.Tensor] = ()) -> int:
    """Run `closure` once and return the bytes that autograd keeps for its result's backward pass.

    Each storage counts once. Storages of `exclude` (a model's parameters: there anyway) do not
    count, nor does what a part of the graph saved that is gone before `closure` returns.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    saved: list[weakref.ref[_Saved]] = []

    def pack(tensor: torch.Tensor) -> _Saved:
        box = _Saved(tensor)
        saved.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, _Saved.unpack):
        result = closure()
    alive = [box.tensor.untyped_storage() for ref in saved if (box := ref()) is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in alive}
    del result, alive
    return sum(size for address, size in sizes.items() if address not in known)


class _Saved:
    """Holds a saved tensor for as long as the graph does.

    Without its graph (detached): a node's own output would lead back to the node, a cycle
    through C++ that nothing collects.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()

    def unpack(self) -> torch.Tensor:
        return self.tensor


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether `error` is torch's way, on any device, of saying that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def requested_bytes(error: BaseException) -> int | None:
    """Return how much the failed allocation asked for, or None when the message does not say."""
    if match := _CUDA_REQUEST.search(str(error)):
        return round(float(match[1]) * _UNITS[match[2]])
    if match := _CPU_REQUEST.search(str(error)):
        return int(match[1])
    return None


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that a new process could use on `device`: all of a GPU's, or the host's
    available."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
    except OSError:
        return None
    return int(fields["MemAvailable"].split()[0]) * 1024


def gib(num_bytes: float | None) -> str:
    """Format a number of bytes for a sentence."""
    return "an unknown amount" if num_bytes is None else f"{num_bytes / 2**30:.2f} GiB"


class MemoryHistory:
    """Context in which CUDA's allocator records every allocation, then dumps them for the memory
    viewer."""

    def __init__(self, path: str, *, max_entries: int = 1_000_000) -> None:
        self._path = path
        self._max_entries = max_entries

    def __enter__(self) -> MemoryHistory:
        torch.cuda.memory._record_memory_history(max_entries=self._max_entries)
        return self

    def __exit__(self, *_: Any) -> None:
        torch.cuda.memory._dump_snapshot(self._path)
        torch.cuda.memory._record_memory_history(enabled=None)
