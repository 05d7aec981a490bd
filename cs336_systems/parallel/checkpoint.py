"""Saving what ranks hold, so that a save that is interrupted never costs the one before it.

A checkpoint is a folder, `000007-step-1200`, with a file per rank and a manifest of them; the file
`latest` names the one to load. All of a folder is on the disk before it gets its name, and it has
its name before `latest` names it. So whenever a rank is killed, `latest` names a whole checkpoint.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cs336_systems.errors import bad
from cs336_systems.parallel.checkpoint_files import (
    DamagedError,
    Manifest,
    Record,
    check_plain,
    read_manifest,
    read_state,
    replace_text,
    sync_folder,
    write_durably,
    write_manifest,
)
from cs336_systems.parallel.collectives import Group, all_gather_object

_LATEST = "latest"
# Whatever begins so is what an interrupted save has left.
_UNFINISHED = ".unfinished-"
_NAME = re.compile(r"(\d{6,})-step-\d+")
_REMEDY = (
    "states of another number of ranks are moved by full_state_dict with replicated=True, or by "
    "torch.distributed.checkpoint"
)
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved or loaded: one line, the same on all ranks."""


def save(
    directory: str | Path,
    state: Mapping[str, Any],
    *,
    step: int,
    replicated: bool = False,
    keep: int = 2,
    group: Group = None,
) -> None:
    """Save the states of all ranks as one checkpoint, and delete all but the `keep` newest ones.

    With `replicated` all ranks have the same state and rank 0's is saved. The directory is one that
    all ranks see and that no other run saves into.
    Raises: CheckpointError when a rank cannot save, after which what was the latest still is.
    """
    if step < 0:
        raise bad("checkpoint", "step", "be >= 0", step)
    if keep < 1:
        raise bad("checkpoint", "keep", "be >= 1", keep)
    directory, (rank, world_size) = Path(directory), _place(group)
    what = f"save step {step}"
    _check_same((step, replicated), group)
    begun = _together(lambda: _begin(directory, step) if rank == 0 else "", what, group)
    name = _exchange(begun, group)[0]
    unfinished = directory / (_UNFINISHED + name)
    try:
        record = _together(
            lambda: None if replicated and rank else _write_state(unfinished, rank, state),
            what,
            group,
        )
        records = _exchange(record, group)
        files = {_file_name(number): r for number, r in enumerate(records) if r is not None}
        manifest = Manifest(step, world_size, replicated, files)
        _together(lambda: None if rank else _commit(directory, name, manifest), what, group)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if rank == 0:
        _delete_old(directory, keep)


def exists(directory: str | Path, *, group: Group = None) -> bool:
    """Tell whether there is anything to load, damaged or not; rank 0 looks for all ranks."""
    rank, _ = _place(group)
    found = _together(lambda: rank == 0 and bool(_candidates(Path(directory))), "look", group)
    return _exchange(found, group)[0]


def load(directory: str | Path, *, group: Group = None) -> tuple[dict[str, Any], int]:
    """Return this rank's state in the latest checkpoint that is undamaged, and its step.

    Tensors are on the CPU. Damaged checkpoints are passed over, which is logged.
    Raises: CheckpointError when there is none, or when it is of another number of ranks.
    """
    directory, (rank, world_size) = Path(directory), _place(group)
    found = _together(lambda: _candidates(directory) if rank == 0 else [], "look", group)
    faults: list[str] = []
    for name in _exchange(found, group)[0]:
        folder, what = directory / name, f"load {name}"
        try:
            manifest = _together(lambda: read_manifest(folder), what, group)  # noqa: B023
            if not manifest.replicated:
                _check_world_size(name, manifest.world_size, world_size)
            file = _file_name(0 if manifest.replicated else rank)
            state = _together(
                lambda: read_state(folder / file, manifest.files[file]),  # noqa: B023
                what,
                group,
            )
        except _RankError as error:
            faults.append(str(error))
            if rank == 0:
                _log.warning("%s", error)
            continue
        if rank == 0:
            _log.log(logging.WARNING if faults else logging.INFO, "checkpoint: loaded %s", name)
        return state, manifest.step
    raise CheckpointError(faults[0] if faults else f"checkpoint: none found in {str(directory)!r}")


class _RankError(CheckpointError):
    """What some ranks could not do."""

    def __init__(self, what: str, errors: Mapping[int, str]) -> None:
        ranks_of: dict[str, list[int]] = {}
        for rank, error in errors.items():
            ranks_of.setdefault(error, []).append(rank)
        each = [
            f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} "
            f"could not {what}: {error}"
            for error, ranks in ranks_of.items()
        ]
        super().__init__(f"checkpoint: {'; '.join(each)}")


# --- saving ---


def _begin(directory: Path, step: int) -> str:
    """Remove what interrupted saves have left and make a folder; return its later name."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob(f"{_UNFINISHED}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    # Numbered by saves, since a run that was set back saves a step again.
    number = max((int(name.partition("-")[0]) for name in _names(directory)), default=0) + 1
    name = f"{number:06d}-step-{step}"
    (directory / (_UNFINISHED + name)).mkdir()
    return name


def _write_state(folder: Path, rank: int, state: Mapping[str, Any]) -> Record:
    check_plain(state)
    return write_durably(folder / _file_name(rank), lambda file: torch.save(state, file))  # type: ignore[arg-type]


def _commit(directory: Path, name: str, manifest: Manifest) -> None:
    """Give the folder its manifest, its name and then its place as the latest."""
    unfinished, previous = directory / (_UNFINISHED + name), _latest(directory)
    write_manifest(unfinished, manifest)
    sync_folder(unfinished)
    os.replace(unfinished, directory / name)
    try:
        sync_folder(directory)
        replace_text(directory / _LATEST, name, directory / (_UNFINISHED + _LATEST))
    except OSError:
        _take_back(directory, name, previous)
        raise


def _take_back(directory: Path, name: str, previous: str | None) -> None:
    """Undo a commit whose last steps failed, as far as the disk allows."""
    with suppress(OSError):
        if _latest(directory) == name:
            # Waiting for the disk may be what failed, so this does not wait.
            spare = directory / (_UNFINISHED + _LATEST)
            spare.write_text(previous or "", encoding="utf-8")
            os.replace(spare, directory / _LATEST)
    if _latest(directory) != name:
        shutil.rmtree(directory / name, ignore_errors=True)


def _delete_old(directory: Path, keep: int) -> None:
    """Delete all but the newest checkpoints; that one cannot be is no reason to stop training."""
    for name in _names(directory)[keep:]:
        doomed = directory / (_UNFINISHED + name)
        try:
            # A half-deleted one must not look like one.
            os.replace(directory / name, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            _log.warning("checkpoint: could not delete %s: %s", name, error)


# --- finding ---


def _file_name(rank: int) -> str:
    return f"rank{rank}.pt"


def _names(directory: Path) -> list[str]:
    """Return the folders with a checkpoint's name, newest first."""
    names = [path.name for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(names, key=lambda name: int(name.partition("-")[0]), reverse=True)


def _latest(directory: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        return (directory / _LATEST).read_text(encoding="utf-8")
    return None


def _candidates(directory: Path) -> list[str]:
    """Return the latest checkpoint, then all others, newest first."""
    if not directory.is_dir():
        return []
    latest = _latest(directory)
    return sorted(_names(directory), key=lambda name: name != latest)


# --- all ranks alike ---


def _place(group: Group) -> tuple[int, int]:
    """Return this rank and how many there are; one where there is no process group."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def _exchange(value: _T, group: Group) -> list[_T]:
    """Return every rank's value; until then no rank goes on."""
    return all_gather_object(value, group) if dist.is_initialized() else [value]


def _together(work: Callable[[], _T], what: str, group: Group) -> _T:
    """Do this rank's work and return its result, if every rank could.

    A rank that dies is felt by the others as an error of the collective, which they leave as it is:
    it is how the launcher tells it from a cause.
    """
    result, error = None, None
    try:
        result = work()
    except (DamagedError, TypeError) as caught:
        error = str(caught)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    errors = {rank: e for rank, e in enumerate(_exchange(error, group)) if e is not None}
    if errors:
        raise _RankError(what, errors)
    return result  # type: ignore[return-value]


def _check_same(mine: tuple[int, bool], group: Group) -> None:
    everyones = _exchange(mine, group)
    for rank, theirs in enumerate(everyones):
        if theirs != everyones[0]:
            raise CheckpointError(
                "checkpoint: step and replicated must be the same on every rank, "
                f"got {everyones[0]} on rank 0 and {theirs} on rank {rank}"
            )


def _check_world_size(name: str, saved: int, here: int) -> None:
    if saved != here:
        raise CheckpointError(
            f"checkpoint: {name} must be loaded on {saved} ranks, got {here}; {_REMEDY}"
        )
