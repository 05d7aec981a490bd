"""Files that are whole and on the disk, or that are known not to be."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from cs336_systems.durable import commit

MANIFEST = "manifest.json"
_log = logging.getLogger(__name__)
# What `torch.load(weights_only=True)` gives back as it was.
_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size)
_TENSORS = (Tensor, nn.Parameter)


class DamagedError(Exception):
    """What lies in a checkpoint's folder is not what was saved there."""


@dataclass(frozen=True)
class Record:
    """What a file must be."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What belongs to a checkpoint."""

    step: int
    world_size: int
    replicated: bool
    files: Mapping[str, Record]


class HashedFile:
    """A file to write to, whose content is hashed on its way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._num_bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._hash.update(data)
        self._num_bytes += memoryview(data).nbytes
        return memoryview(data).nbytes

    def flush(self) -> None:
        self._file.flush()

    @property
    def record(self) -> Record:
        return Record(self._num_bytes, self._hash.hexdigest())


def write_durably(path: Path, fill: Callable[[HashedFile], object]) -> Record:
    """Write a file by `fill` and wait until it is on the disk; try twice.

    Raises: OSError when it cannot be written.
    """
    try:
        return _write(path, fill)
    except OSError as error:
        _log.warning("checkpoint: writing %s again after: %s", path.name, error)
        return _write(path, fill)


def _write(path: Path, fill: Callable[[HashedFile], object]) -> Record:
    with path.open("wb") as file:
        hashed = HashedFile(file)
        try:
            fill(hashed)
        except Exception:
            # torch.save closes its archive whatever happens, and complains about that instead.
            if hashed.error is not None:
                raise hashed.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return hashed.record


def replace_text(path: Path, text: str, temporary: Path) -> None:
    """Make the file say `text`; whoever reads it meanwhile sees the old text or the new one."""
    write_durably(temporary, lambda file: file.write(text.encode()))
    commit(temporary, path)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    content = asdict(manifest)
    # It is what all other files are checked against, so it brings its own check.
    whole = {"content": content, "sha256": _sha256_of(content)}
    text = json.dumps(whole, indent=1, sort_keys=True) + "\n"
    write_durably(folder / MANIFEST, lambda file: file.write(text.encode()))


def read_manifest(folder: Path) -> Manifest:
    """Read what belongs to a checkpoint, and check that there is no more and no less.

    Raises: DamagedError; OSError when it cannot be read.
    """
    if not (folder / MANIFEST).exists():
        raise DamagedError(f"{MANIFEST} is missing")
    try:
        whole = json.loads((folder / MANIFEST).read_bytes())
        content = whole["content"]
        if whole["sha256"] != _sha256_of(content):
            raise DamagedError(f"{MANIFEST} is not as it was written")
        files = {name: Record(**record) for name, record in content.pop("files").items()}
        manifest = Manifest(files=files, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read") from error
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    if missing := sorted(set(files) - there):
        raise DamagedError(f"{missing[0]} is missing")
    if foreign := sorted(there - set(files)):
        raise DamagedError(f"{foreign[0]} does not belong to it")
    return manifest


def read_state(path: Path, record: Record) -> dict[str, Any]:
    """Load one rank's state, once it is known to be the one that was saved; tensors on the CPU.

    Raises: DamagedError; OSError when it cannot be read.
    """
    if (num_bytes := path.stat().st_size) != record.num_bytes:
        raise DamagedError(f"{path.name} has {num_bytes} bytes instead of {record.num_bytes}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != record.sha256:
        raise DamagedError(f"{path.name} is not as it was written")
    return torch.load(path, map_location="cpu", weights_only=True)


def check_plain(value: object, name: str = "state") -> None:
    """Check that a state can be loaded without running code of its own.

    Raises: TypeError naming what cannot.
    """
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():  # type: ignore[attr-defined]
            check_plain(key, f"a key of {name}")
            check_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):  # type: ignore[arg-type]
            check_plain(item, f"{name}[{index}]")
    elif type(value) not in (*_VALUES, *_TENSORS):
        raise TypeError(
            f"{name} must be of dicts, lists, tensors, numbers and text, got {type(value).__name__}"
        )


def _sha256_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
