"""Is work done again when, and only when, its inputs or outputs have changed?"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cs336_systems.errors import UsageError
from cs336_systems.train.stages import Stage


class Work:
    """Writes its stage's outputs, and counts how often."""

    def __init__(self, folder: Path, text: str = "made") -> None:
        self.folder, self.text = folder, text
        self.said: list[str] = []
        self.num_runs = 0

    def __call__(self) -> None:
        self.num_runs += 1
        for name in ("a.out", "b.out"):
            (self.folder / name).write_text(f"{self.text} {name}")

    def stage(self, **inputs: Any) -> Stage:
        outputs = (self.folder / "a.out", self.folder / "b.out")
        return Stage(name="bake", folder=self.folder, inputs=inputs, outputs=outputs)

    def run(self, **inputs: Any) -> str:
        """Run the stage and return the first line that it said."""
        self.said = []
        self.stage(**inputs).run(self, self.said.append)
        return self.said[0]


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def test_what_is_up_to_date_is_skipped_and_says_why(work: Work) -> None:
    assert work.run(size=3, names=("x", "y")) == "bake: runs, not done yet"
    assert work.said[1].startswith("bake: done in ")
    assert work.run(size=3, names=("x", "y")) == "bake: up to date (size, names unchanged)"
    assert work.num_runs == 1


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"size": 4, "of": {"a": 1, "b": 2}}, "size changed from 3 to 4"),
        ({"size": None, "of": {"a": 1, "b": 2}}, "size changed from 3 to null"),
        ({"size": 3, "of": {"a": 1, "b": 5}}, "of.b changed from 2 to 5"),
        ({"size": 4, "of": {"a": 1}}, "size changed from 3 to 4, of.b changed from 2 to null"),
        ({"size": "f" * 64, "of": {"a": 1, "b": 2}}, "size changed"),
        ({"of": {"a": 1, "b": 2}}, "size changed from 3 to null"),
    ],
)
def test_what_reruns_says_what_changed(work: Work, inputs: dict[str, Any], reason: str) -> None:
    work.run(size=3, of={"a": 1, "b": 2})
    assert work.run(**inputs) == f"bake: runs, {reason}"
    assert work.run(**inputs).startswith("bake: up to date")
    assert work.num_runs == 2


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(then=JSON_VALUES, now=JSON_VALUES)
def test_an_input_counts_as_changed_when_its_json_is_another(
    tmp_path_factory: pytest.TempPathFactory, then: Any, now: Any
) -> None:
    work = Work(tmp_path_factory.mktemp("stage"))
    work.run(it=then)
    is_same = json.loads(json.dumps(then)) == json.loads(json.dumps(now))
    assert (work.stage(it=now).reason_to_run() is None) == is_same
    assert work.stage(it=then).reason_to_run() is None


def test_missing_and_damaged_outputs_are_made_again(work: Work) -> None:
    work.run()
    (work.folder / "b.out").unlink()
    assert work.run() == "bake: runs, b.out is missing"
    # As long as before.
    (work.folder / "a.out").write_text("MADE a.out")
    assert work.run() == "bake: runs, a.out is not as it was written"
    os.truncate(work.folder / "a.out", 3)
    assert work.run() == "bake: runs, a.out is not as it was written"
    assert work.run().startswith("bake: up to date")


def test_an_output_that_was_only_touched_is_as_it_was(work: Work) -> None:
    work.run()
    os.utime(work.folder / "a.out", ns=(1, 1))
    assert work.run().startswith("bake: up to date")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"inputs": 3, "outputs": {}}'])
def test_a_damaged_record_says_nothing(work: Work, text: str) -> None:
    work.run()
    work.stage().record_path.write_text(text)
    assert work.run() == "bake: runs, bake.stage.json is damaged"
    assert work.run().startswith("bake: up to date")


def test_work_that_fails_is_done_again(work: Work) -> None:
    def fails() -> None:
        (work.folder / "a.out").write_text("half")
        raise UsageError("oven: cold")

    work.run(size=1)
    with pytest.raises(UsageError, match="oven: cold"):
        work.stage(size=2).run(fails, work.said.append)
    assert work.run(size=2) == "bake: runs, size changed from 1 to 2"
    with pytest.raises(UsageError, match="oven: cold"):
        work.stage(size=3).run(fails, work.said.append)
    assert work.run(size=2) == "bake: runs, a.out is not as it was written"


def test_a_record_that_cannot_be_written_is_one_line(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    work.run(size=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UsageError, match=r"bake.stage.json cannot be written: No space left"):
            work.run(size=2)
    assert work.run(size=2) == "bake: runs, size changed from 1 to 2"
