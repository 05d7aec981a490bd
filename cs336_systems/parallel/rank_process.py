"""What runs inside one rank that `launch.RankPool` started: take a call, run it, answer.

The process ends by a signal of its own, never through atexit, where NCCL can hang.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import os
import pickle
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

# What errors of collectives say; gloo's own name is not in what it says of a late peer.
_ECHOES = ("gloo", "NCCL", "Application timeout caused pair closure")


@dataclass(frozen=True)
class Failure:
    """How a rank failed, in text: the exception itself may not survive pickling."""

    summary: str
    traceback: str
    is_echo: bool
    """Raised by a collective, which is how the fault of another rank is felt."""
    monotonic_s: float
    """When, on the clock that all processes of this machine share."""


def pack(value: object) -> bytes:
    """Pickle by value; tensors that share memory share it again on the other side."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=pickle.DEFAULT_PROTOCOL)
    return buffer.getvalue()


def unpack(payload: bytes) -> Any:
    """Return what was packed, its tensors on the CPU."""
    import torch

    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=False)


def join_group(
    backend: str, init_method: str, rank: int, world_size: int, timeout_s: float
) -> None:
    """Set up the default process group of this rank, on GPU number `rank` for NCCL."""
    import torch
    import torch.distributed as dist

    device = None
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device,
    )


def serve(fd: int, folder: str, rank: int) -> NoReturn:
    """Answer calls until the parent goes away."""
    stacks = (Path(folder) / f"rank{rank}.stacks").open("wb")
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)
    os.set_inheritable(fd, False)
    connection = Connection(fd)
    calls: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, calls, folder), daemon=True).start()
    while True:
        failure, payload = _answer(calls.get())
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        with contextlib.suppress(BrokenPipeError):
            connection.send((failure, payload))
        if failure is not None:
            # Peers inside a collective feel it at once, rather than after their timeout.
            _end()


def _read(connection: Connection, calls: queue.SimpleQueue[bytes], folder: str) -> None:
    """Queue calls from a thread of its own, so that a busy rank notices the parent's death too."""
    while True:
        try:
            calls.put(connection.recv_bytes())
        except (EOFError, OSError):
            shutil.rmtree(folder, ignore_errors=True)
            _end()


def _end() -> NoReturn:
    """End this process and its own children, say of a data loader; it leads their group."""
    os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _answer(request: bytes) -> tuple[Failure | None, bytes]:
    try:
        main_name, call = pickle.loads(request)
        if main_name is not None and _main.name != main_name:
            _main.load(main_name)
        function, args, kwargs = unpack(call)
        return None, pack(function(*args, **kwargs))
    except BaseException as error:
        return _describe(error), b""


class _Main:
    """The program whose functions are called, imported here under its own name."""

    def __init__(self) -> None:
        self.name = ""
        self.is_loading = False

    def load(self, name: str) -> None:
        self.name = name
        self.is_loading = True
        sys.modules["__main__"] = importlib.import_module(name)
        self.is_loading = False


_main = _Main()


def is_loading_main() -> bool:
    """Tell whether the code that asks runs because a rank imports the program that started it."""
    return _main.is_loading


def _describe(error: BaseException) -> Failure:
    import torch.distributed as dist

    lines = traceback.format_exception_only(error)
    text = str(error)
    is_echo = isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and any(words in text for words in _ECHOES)
    )
    return Failure(
        summary=lines[-1].strip().partition("\n")[0],
        traceback="".join(traceback.format_exception(error)),
        is_echo=is_echo,
        monotonic_s=time.monotonic(),
    )
