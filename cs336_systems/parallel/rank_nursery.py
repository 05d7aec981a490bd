"""Ranks by fork of one process that has imported torch, which each of them would take seconds for.

The nursery holds nothing but imported modules: a rank gets its environment, path, working directory
and output from the process that asked for it, as if that had started it. How a rank ended is told
through a pipe of its own. Linux only; elsewhere, and where forking fails, ranks are started anew.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, NoReturn

# The first process ends at once, so that nobody has to wait for the nursery's own end.
_BOOT = """\
import json, os, sys
if os.fork():
    os._exit(0)
settings = json.loads(sys.argv[1])
sys.path[:] = settings["path"]
from cs336_systems.parallel.rank_nursery import tend
tend(settings["fd"])
"""
_STATUS = struct.Struct("i")
_SIZE = struct.Struct("q")
_OUTPUTS = (1, 2)
# As many as there are kinds of environments in use at once.
_MOST_NURSERIES = 2


class Forked:
    """A rank's process, with the methods of `subprocess.Popen` that its handle calls."""

    def __init__(self, pid: int, status_fd: int) -> None:
        self.pid = pid
        self._status_fd = status_fd
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal's; None while the process runs."""
        if self._code is None and _is_readable(self._status_fd, 0.0):
            told = os.read(self._status_fd, _STATUS.size)
            os.close(self._status_fd)
            if told:
                self._code = _STATUS.unpack(told)[0]
            else:
                # The nursery was killed and nobody would tell, so the rank ends here.
                self._code = -signal.SIGKILL
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code.

        Raises: subprocess.TimeoutExpired.
        """
        if self._code is None:
            _is_readable(self._status_fd, timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _is_readable(descriptor: int, limit_s: float | None) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if limit_s is None else 1000 * limit_s))


def fork_rank(
    settings: Mapping[str, Any], environment: Mapping[str, str], connection: Connection
) -> Forked | None:
    """Start `rank_process.serve(**settings)` on the rank's end of a connection.

    Returns None where there is no nursery to be had.
    """
    if sys.platform != "linux":
        return None
    settings = {
        **settings,
        "path": _import_path(),
        "environment": dict(environment),
        "folder_of_work": os.getcwd(),
    }
    with _lock:
        for _ in range(2):  # once more where the nursery was killed meanwhile
            key, nursery = _nursery(environment)
            with contextlib.suppress(OSError):
                return nursery.fork(connection, json.dumps(settings).encode())
            _close(key)
    return None


def start_python(
    boot: str, settings: Mapping[str, Any], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start `boot` in a new interpreter and session, its argument the JSON of `settings` and this
    process' path; what they call `fd` stays open there."""
    told = json.dumps({"path": _import_path(), **settings})
    options = [f"-W{option}" for option in sys.warnoptions]
    return subprocess.Popen(
        [sys.executable, *options, "-c", boot, told],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        pass_fds=[settings["fd"]],
        start_new_session=True,
    )


def _import_path() -> list[str]:
    return [entry for entry in sys.path if isinstance(entry, str)]


class _Nursery:
    """This process' side of a nursery."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            started = start_python(_BOOT, {"fd": theirs.fileno()}, environment)
            if code := started.wait():
                raise subprocess.CalledProcessError(code, "the nursery of ranks")

    def fork(self, theirs: Connection, settings: bytes) -> Forked:
        status_fd, told_fd = os.pipe()
        try:
            fds = [theirs.fileno(), told_fd, *_OUTPUTS]
            socket.send_fds(self._control, [_SIZE.pack(len(settings))], fds)
            self._control.sendall(settings)
            answer = self._control.recv(_STATUS.size)
            if not answer:
                raise ConnectionError("the nursery has ended")
            return Forked(_STATUS.unpack(answer)[0], status_fd)
        except BaseException:
            os.close(status_fd)
            raise
        finally:
            os.close(told_fd)

    def close(self) -> None:
        """Ask for no more ranks; the nursery ends with the last that it has."""
        self._control.close()


_Key = tuple[Any, ...]
_lock = threading.Lock()
_nurseries: dict[_Key, _Nursery] = {}


def _nursery(environment: Mapping[str, str]) -> tuple[_Key, _Nursery]:
    """Return the nursery of this process and environment, which modules read as they load."""
    # A forked copy of this process finds entries that are not its own.
    key = (os.getpid(), *sorted(environment.items()))
    if key not in _nurseries:
        while len(_nurseries) >= _MOST_NURSERIES:
            _close(next(iter(_nurseries)))
        _nurseries[key] = _Nursery(environment)
    return key, _nurseries[key]


def _close(key: _Key) -> None:
    _nurseries.pop(key).close()


@atexit.register
def _close_all() -> None:
    for key in list(_nurseries):
        _close(key)


# --- in the nursery ---


def tend(fd: int) -> NoReturn:
    """Fork a rank for each request until the process that asks goes away."""
    import torch.distributed.checkpoint  # with all that it imports of torch

    import cs336_systems.parallel.rank_process  # noqa: F401

    assert not torch.cuda.is_initialized(), "a fork could not use the GPU"
    control = socket.socket(fileno=fd)
    ended, noticed = os.pipe()
    for descriptor in (ended, noticed):
        os.set_blocking(descriptor, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(noticed)
    tell: dict[int, int] = {}
    is_asked = True
    while is_asked or tell:
        poll = select.poll()
        for descriptor in (ended, control.fileno()) if is_asked else (ended,):
            poll.register(descriptor, select.POLLIN)
        ready = [descriptor for descriptor, _ in poll.poll()]
        if ended in ready:
            os.read(ended, 4096)
            _tell_of_the_ended(tell)
        if is_asked and control.fileno() in ready:
            header, fds, _, _ = socket.recv_fds(control, _SIZE.size, 2 + len(_OUTPUTS))
            if not header:
                is_asked = False
                continue
            settings = _received(control, *_SIZE.unpack(header))
            pid = _fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for descriptor in (control.detach(), ended, noticed, *tell.values()):
                    os.close(descriptor)
                _become_rank(json.loads(settings), *fds)
            tell[pid] = fds.pop(1)
            for descriptor in fds:
                os.close(descriptor)
            control.sendall(_STATUS.pack(pid))
    os._exit(0)


def _fork() -> int:
    with warnings.catch_warnings():
        # Python warns of threads that libraries have started; none runs Python code.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    # Both try, so that the group is there for whoever goes on first.
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    return pid


def _received(control: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes and (part := control.recv(num_bytes - len(data))):
        data += part
    return data


def _tell_of_the_ended(tell: dict[int, int]) -> None:
    """Say of each rank that has ended how it did."""
    while tell:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(tell[pid], _STATUS.pack(os.waitstatus_to_exitcode(status)))
        os.close(tell.pop(pid))


def _become_rank(
    settings: dict[str, Any], connection_fd: int, told_fd: int, out_fd: int, err_fd: int
) -> NoReturn:
    """Be as a process that was started for this rank."""
    from cs336_systems.parallel.rank_process import serve

    os.close(told_fd)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for descriptor, number in zip((out_fd, err_fd), _OUTPUTS, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(settings.pop("environment"))
    os.chdir(settings.pop("folder_of_work"))
    sys.path[:] = settings.pop("path")
    sys.argv[1:] = []
    serve(fd=connection_fd, **settings)
