"""Does the checkpoint before survive whatever happens to a save, and is damage never loaded?"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import checkpoint_kills
import checkpoint_ranks as ranks_do
import pytest
import torch
import training_ranks
from fsdp_models import Case
from hypothesis import example, given
from hypothesis import strategies as st
from processes import run_python
from ranks import pool

from cs336_systems.errors import UsageError
from cs336_systems.parallel import checkpoint, checkpoint_files
from cs336_systems.parallel.checkpoint import CheckpointError
from cs336_systems.parallel.launch import RankFailedError, RankPool

ON_RANKS = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]
FULL = "[Errno 28] No space left on device"


def on_ranks(function: object) -> object:
    for mark in ON_RANKS:
        function = mark(function)
    return function


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def two_saved(tmp_path: Path) -> Path:
    """Two checkpoints of two ranks, of the steps 1 and 2."""
    for step in (1, 2):
        pool(2).run(ranks_do.save_in, [str(tmp_path)], step)
    return tmp_path


@pytest.fixture(scope="module")
def saved_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of this process, which is in no group."""
    folder = tmp_path_factory.mktemp("alone") / "checkpoints"
    for step in (1, 2):
        checkpoint.save(folder, ranks_do.state_of(0, step), step=step)
    return folder


# --- saved and loaded ---


def test_without_a_process_group_this_is_the_only_rank(saved_alone: Path) -> None:
    state, step = checkpoint.load(saved_alone)
    assert step == 2
    assert ranks_do.same(state, ranks_do.state_of(0, 2))


@on_ranks
def test_each_rank_gets_its_own_state_of_the_latest_step(two_saved: Path) -> None:
    assert contents(two_saved) == ["000001-step-1", "000002-step-2", "latest"]
    assert contents(two_saved / "000002-step-2") == ["manifest.json", "rank0.pt", "rank1.pt"]
    found = pool(2).run(ranks_do.load_with_log, str(two_saved))
    assert found == [(2, [])] * 2


@on_ranks
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_are_kept_as_asked(tmp_path: Path, keep: int) -> None:
    for step in (1, 2, 3, 4):
        pool(2).run(ranks_do.save_in, [str(tmp_path)], step, keep=keep)
    names = ["000001-step-1", "000002-step-2", "000003-step-3", "000004-step-4"]
    assert contents(tmp_path) == [*names[-keep:], "latest"]


@on_ranks
def test_a_step_saved_again_is_a_checkpoint_of_its_own(two_saved: Path) -> None:
    pool(2).run(ranks_do.save_in, [str(two_saved)], 2)
    assert contents(two_saved) == ["000002-step-2", "000003-step-2", "latest"]
    assert pool(2).run(ranks_do.load_from, [str(two_saved)]) == [[2], [2]]


@on_ranks
def test_another_number_of_ranks_is_refused_with_the_remedy(two_saved: Path) -> None:
    ((error,),) = pool(1).run(ranks_do.load_from, [str(two_saved)])
    assert error == (
        "checkpoint: 000002-step-2 must be loaded on 2 ranks, got 1; states of another number of "
        "ranks are moved by full_state_dict with replicated=True, or by "
        "torch.distributed.checkpoint"
    )


@on_ranks
def test_a_replicated_state_loads_on_any_number_of_ranks(tmp_path: Path) -> None:
    pool(2).run(ranks_do.save_in, [str(tmp_path)], 3, replicated=True)
    assert contents(tmp_path / "000001-step-3") == ["manifest.json", "rank0.pt"]
    for world_size in (1, 2, 3):
        found = pool(world_size).run(ranks_do.load_from, [str(tmp_path)])
        assert found == [[3]] * world_size
    state, step = checkpoint.load(tmp_path)
    assert step == 3
    assert ranks_do.same(state, ranks_do.state_of(0, 3))


@on_ranks
@pytest.mark.parametrize("features", [frozenset(), frozenset({"bias", "tied", "frozen_some"})])
def test_training_resumed_from_shards_has_the_bits_of_one_that_went_on(
    tmp_path: Path, features: frozenset[str]
) -> None:
    case = Case(features=features, optimizer="adamw")
    wanted = pool(2).run(training_ranks.train, case, range(5), None)
    halfway = pool(2).run(training_ranks.train, case, range(2), str(tmp_path))
    got = pool(2).run(training_ranks.train, case, range(2, 5), str(tmp_path), resume=True)
    for ours, theirs, before in zip(got, wanted, halfway, strict=True):
        assert ranks_do.same(ours, theirs)
        assert not ranks_do.same(ours, before)


# --- refused ---


@on_ranks
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            "object",
            "checkpoint: rank 1 could not save step 9: state['model']['module'] must be of dicts, "
            "lists, tensors, numbers and text, got Linear",
        ),
        (
            "step",
            "checkpoint: step and replicated must be the same on every rank, got (9, False) on "
            "rank 0 and (10, False) on rank 1",
        ),
    ],
)
def test_what_one_rank_cannot_save_is_the_same_error_on_all(
    two_saved: Path, kind: str, text: str
) -> None:
    before = contents(two_saved)
    assert pool(2).run(ranks_do.save_unequal, str(two_saved), kind) == [text] * 2
    assert contents(two_saved) == before
    assert pool(2).run(ranks_do.load_from, [str(two_saved)]) == [[2], [2]]


@pytest.mark.parametrize(("options", "rule"), [({"step": -1}, "step"), ({"keep": 0}, "keep")])
def test_wrong_numbers_are_refused(tmp_path: Path, options: dict[str, int], rule: str) -> None:
    with pytest.raises(UsageError, match=f"checkpoint: {rule} must be >= "):
        checkpoint.save(tmp_path, {}, **{"step": 0, **options})
    assert contents(tmp_path) == []


def test_a_folder_without_checkpoints_says_so(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=f"checkpoint: none found in '{folder}'"):
            checkpoint.load(folder)


# --- a full disk ---


@on_ranks
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("operation", "first"), [("write", 1), ("write", 7), ("fsync", 1)])
def test_full_disk_is_the_same_error_on_all_ranks(
    two_saved: Path, rank: int, operation: str, first: int
) -> None:
    before = contents(two_saved)
    errors = pool(2).run(ranks_do.save_on_full_disk, str(two_saved), operation, rank, first, 10_000)
    assert errors == [f"checkpoint: rank {rank} could not save step 9: OSError: {FULL}"] * 2
    assert contents(two_saved) == before
    assert pool(2).run(ranks_do.load_from, [str(two_saved)]) == [[2], [2]]


@on_ranks
@pytest.mark.parametrize("call", range(1, 8))
def test_full_disk_at_any_step_of_the_commit(two_saved: Path, call: int) -> None:
    """All of rank 0's waits for the disk; the first two of its file are tried again."""
    before = contents(two_saved)
    errors = pool(2).run(ranks_do.save_on_full_disk, str(two_saved), "fsync", 0, call, 10_000)
    # Its own file, the manifest, the folder, its name, the pointer, the pointer's name: no more.
    if call <= 6:
        assert errors == [f"checkpoint: rank 0 could not save step 9: OSError: {FULL}"] * 2
        assert pool(2).run(ranks_do.load_from, [str(two_saved)]) == [[2], [2]]
        # The pointer's spare file may stay until the next save.
        assert [name for name in contents(two_saved) if not name.startswith(".")] == before
    else:
        assert errors == ["no error"] * 2
        assert pool(2).run(ranks_do.load_from, [str(two_saved)]) == [[9], [9]]


@on_ranks
@pytest.mark.parametrize("operation", ["write", "fsync"])
def test_a_write_that_failed_once_is_tried_again(two_saved: Path, operation: str) -> None:
    errors = pool(2).run(ranks_do.save_on_full_disk, str(two_saved), operation, 1, 1, 1)
    assert errors == ["no error"] * 2
    assert pool(2).run(ranks_do.load_from, [str(two_saved)]) == [[9], [9]]


# --- a killed rank ---


@on_ranks
@pytest.mark.parametrize("victim", [0, 1])
def test_rank_killed_at_any_step_of_a_save(tmp_path: Path, victim: int) -> None:
    program = Path(checkpoint_kills.__file__)
    run = run_python(str(program), str(tmp_path), "2", str(victim), folder=program.parent)
    assert run.returncode == 0, run.stderr
    killed = sorted(tmp_path.glob("*.operation"))
    operations = [path.read_text() for path in killed]
    writing = {"write", "fsync"}
    assert set(operations) == (writing if victim else {*checkpoint_kills.OPERATIONS, "write"})
    folders = [str(path.with_suffix("")) for path in killed]

    steps, others = pool(2).run(ranks_do.load_from, folders)
    assert steps == others
    assert set(steps) == ({2} if victim else {2, 3})
    # Once it is the latest it stays that: from the wait for the pointer's name on.
    assert steps == sorted(steps)
    if victim == 0:
        pointer = max(n for n, operation in enumerate(operations[:-5]) if operation == "replace")
        assert steps.index(3) == pointer + 1

    pool(2).run(ranks_do.save_in, folders, 4)
    assert pool(2).run(ranks_do.load_from, folders) == [[4] * len(folders)] * 2
    for folder in folders:
        *old, latest, pointer_file = contents(Path(folder))
        assert pointer_file == "latest"
        assert re.fullmatch(r"00000[34]-step-4", latest)
        assert len(old) == 1
        assert re.fullmatch(r"00000[23]-step-[23]", old[0])


@on_ranks
def test_parent_names_the_rank_that_was_killed_during_a_save(two_saved: Path) -> None:
    with RankPool(2, timeout_s=20) as own:
        with pytest.raises(RankFailedError, match="rank 1 of 2: was killed by SIGKILL"):
            own.run(ranks_do.save_and_die, str(two_saved), 1, signal.SIGKILL)
        assert ".unfinished-000003-step-9" in contents(two_saved)
        assert own.run(ranks_do.load_from, [str(two_saved)]) == [[2], [2]]


# --- damage ---


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": (
        lambda f: truncate(f / "rank1.pt"),
        r"rank 1 could not load 000002-step-2: rank1.pt has \d+ bytes instead of \d+",
    ),
    "flipped byte": (
        lambda f: flip(f / "rank1.pt"),
        "rank 1 could not load 000002-step-2: rank1.pt is not as it was written",
    ),
    "missing shard": (
        lambda f: (f / "rank1.pt").unlink(),
        "ranks 0, 1 could not load 000002-step-2: rank1.pt is missing",
    ),
    "extra shard": (
        lambda f: shutil.copy(f / "rank1.pt", f / "rank2.pt"),
        "ranks 0, 1 could not load 000002-step-2: rank2.pt does not belong to it",
    ),
    "foreign shard": (
        lambda f: shutil.copy(f.parent / "000001-step-1" / "rank1.pt", f / "rank1.pt"),
        "rank 1 could not load 000002-step-2: rank1.pt is not as it was written",
    ),
    "swapped shards": (
        lambda f: shutil.copy(f / "rank0.pt", f / "rank1.pt"),
        "rank 1 could not load 000002-step-2: rank1.pt .*",
    ),
    "missing manifest": (
        lambda f: (f / "manifest.json").unlink(),
        "ranks 0, 1 could not load 000002-step-2: manifest.json is missing",
    ),
    "other manifest": (
        lambda f: shutil.copy(f.parent / "000001-step-1" / "manifest.json", f),
        "rank 0 could not load 000002-step-2: rank0.pt is not as it was written; rank 1 .*",
    ),
    "missing folder": (lambda f: shutil.rmtree(f), ""),
}


@on_ranks
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over_on_all_ranks(two_saved: Path, damage: str) -> None:
    do, pattern = DAMAGES[damage]
    do(two_saved / "000002-step-2")
    (step, lines), (other_step, other_lines) = pool(2).run(ranks_do.load_with_log, str(two_saved))
    assert step == other_step == 1
    assert other_lines == []
    if pattern:
        assert re.fullmatch(f"checkpoint: {pattern}", lines[0])
        assert lines[1:] == ["checkpoint: loaded 000001-step-1"]


@on_ranks
def test_no_undamaged_checkpoint_is_the_same_error_on_all_ranks(two_saved: Path) -> None:
    for folder in two_saved.glob("*-step-*"):
        truncate(folder / "rank1.pt")
    (error,), (other,) = pool(2).run(ranks_do.load_from, [str(two_saved)])
    assert error == other
    assert re.fullmatch(
        r"checkpoint: rank 1 could not load 000002-step-2: rank1.pt has \d+ bytes instead of \d+",
        error,
    )


@pytest.mark.parametrize("how", ["missing", "empty", "foreign"])
def test_without_its_pointer_the_newest_is_the_latest(saved_alone: Path, how: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(saved_alone, Path(name) / "copy"))
        pointer = folder / "latest"
        if how == "missing":
            pointer.unlink()
        else:
            pointer.write_text("" if how == "empty" else "000099-step-7")
        assert checkpoint.load(folder)[1] == 2


def test_interrupted_rename_leaves_the_one_before(saved_alone: Path, tmp_path: Path) -> None:
    """All is written, with its manifest, but never got its name."""
    folder = Path(shutil.copytree(saved_alone, tmp_path / "copy"))
    (folder / "000002-step-2").rename(folder / ".unfinished-000002-step-2")
    assert checkpoint.load(folder)[1] == 1
    checkpoint.save(folder, ranks_do.state_of(0, 3), step=3)
    assert contents(folder) == ["000001-step-1", "000002-step-3", "latest"]


FILES = ["000002-step-2/rank0.pt", "000002-step-2/manifest.json", "latest"]


@example(FILES[0], "flip", 0.5, 1)
@example(FILES[1], "flip", 0.5, 1)
@example(FILES[2], "flip", 0.4, 3)  # names the one before
@given(
    file=st.sampled_from(FILES),
    kind=st.sampled_from(["flip", "cut", "append"]),
    place=st.floats(0, 1, exclude_max=True),
    bits=st.integers(1, 255),
)
def test_whatever_byte_is_damaged_what_loads_is_what_was_saved(
    saved_alone: Path, file: str, kind: str, place: float, bits: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(saved_alone, Path(name) / "copy"))
        data = bytearray((folder / file).read_bytes())
        where = int(place * len(data))
        if kind == "flip":
            data[where] ^= bits
        elif kind == "cut":
            del data[where:]
        else:
            data.append(bits)
        meant = _content(folder / file)
        (folder / file).write_bytes(data)
        state, step = checkpoint.load(folder)
        assert ranks_do.same(state, ranks_do.state_of(0, step))
        if file == FILES[0]:
            assert step == 1
        elif file == FILES[1]:
            # Spaces between its words may be others.
            assert step == (2 if _content(folder / file) == meant else 1)
        else:
            assert step in (1, 2)


def _content(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def test_which_checkpoint_is_used_instead_is_logged_and_no_warning(
    saved_alone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(saved_alone, tmp_path / "copy"))
    flip(folder / FILES[0])
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load(folder)[1] == 1
    assert [record.getMessage() for record in caplog.records] == [
        "checkpoint: rank 0 could not load 000002-step-2: rank0.pt is not as it was written",
        "checkpoint: loaded 000001-step-1",
    ]


def test_what_would_run_code_is_not_loaded(saved_alone: Path, tmp_path: Path) -> None:
    """Even where the manifest fits, as one that was made for it would."""
    folder = Path(shutil.copytree(saved_alone, tmp_path / "copy")) / "000002-step-2"
    shutil.rmtree(folder.parent / "000001-step-1")
    torch.save({"module": torch.nn.Linear(1, 1)}, folder / "rank0.pt")
    data = (folder / "rank0.pt").read_bytes()
    record = checkpoint_files.Record(len(data), hashlib.sha256(data).hexdigest())
    manifest = checkpoint_files.read_manifest(folder)
    checkpoint_files.write_manifest(folder, replace(manifest, files={"rank0.pt": record}))
    with pytest.raises(CheckpointError, match="UnpicklingError"):
        checkpoint.load(folder.parent)
