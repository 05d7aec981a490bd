"""Is everything that must be handed in inside the zip, and nothing else?"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import zipfile
from pathlib import Path

import make_submission
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from make_submission import REQUIRED_FILES, SubmissionError, check_zip, make

WANTED = (
    *REQUIRED_FILES,
    ".gitignore",
    "LICENSE",
    "benchmarks/bench_x.py",
    "docs/naïve résumé 图.md",
    "env/loader.py",
    "notes.txt",
    "reports/build/table.md",
    "reports/data/a.json",
    "reports/plots/a.png",
    "tests/build/data.json",
    "tests/test_x.py",
    "tools/build/x.py",
)
UNWANTED = {
    ".venv/": ".venv/lib/site.py",
    "my env/": "my env/pyvenv.cfg",
    "node_modules/": "node_modules/x.js",
    "cs336_systems/__pycache__/": "cs336_systems/__pycache__/x.pyc",
    "x.egg-info/": "x.egg-info/PKG-INFO",
    "runs/a.pt": "runs/a.pt",
    "reports/a.safetensors": "reports/a.safetensors",
    "reports/snapshot.pickle": "reports/snapshot.pickle",
    "tokens.npy": "tokens.npy",
    ".env": ".env",
}
IGNORED = {
    "cs336-basics/.git": "cs336-basics/.git",
    "out/": "out/a.json",
    "data/": "data/a.txt",
    "checkpoints/": "checkpoints/a.pt",
}
HIDDEN = (".hypothesis/x", ".mypy_cache/x")
EXECUTABLE = {"run_benchmarks.sh", "test_and_make_submission.sh"}


def git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=T", "-c", "user.email=t@example.invalid")
    subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True)


def write(root: Path, path: str, text: str | None = None) -> Path:
    full = root / path
    full.parent.mkdir(parents=True, exist_ok=True)
    full.write_text(path if text is None else text)
    return full


@pytest.fixture(params=["git", "folder"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small project with everything that is easily packed or dropped by mistake."""
    root = tmp_path / "my project"
    for path in (*WANTED, *UNWANTED.values(), *IGNORED.values(), *HIDDEN):
        write(root, path)
    for path in EXECUTABLE:
        (root / path).chmod(0o755)
    write(root, ".gitignore", "/test_results.xml\n/out/\n/data/\n/checkpoints/\nreports/plots/\n")
    if request.param == "git":
        git(root, "init", "-q")
        git(root, "add", "README.md", "tests", "notes.txt")
        git(root, "commit", "-qm", "start")
        # Ignore rules of this machine alone must not decide what is handed in.
        (root / ".git/info/exclude").write_text("build\n*.json\n*.txt\n")
    return root


def packed(project: Path) -> tuple[dict[str, zipfile.ZipInfo], dict[str, str]]:
    output = project / make_submission.ZIP_NAME
    selection = make(project, output)
    with zipfile.ZipFile(output) as archive:
        members = {info.filename: info for info in archive.infolist()}
        assert archive.read("notes.txt") == (project / "notes.txt").read_bytes()
    return members, {left.path: left.reason for left in selection.left_out}


def test_holds_exactly_what_is_wanted(project: Path) -> None:
    members, left_out = packed(project)
    assert sorted(members) == sorted(WANTED)
    assert list(members) == sorted(members)
    assert UNWANTED.keys() <= left_out.keys()
    assert left_out["my env/"] == "environment"
    if not (project / ".git").exists():
        assert IGNORED.keys() <= left_out.keys()


def test_executable_bits_survive(project: Path) -> None:
    members, _ = packed(project)
    modes = {path: stat.S_IMODE(info.external_attr >> 16) for path, info in members.items()}
    assert modes == {path: 0o755 if path in EXECUTABLE else 0o644 for path in WANTED}


def test_same_files_give_the_same_bytes(project: Path) -> None:
    output = project / make_submission.ZIP_NAME
    make(project, output)
    first = output.read_bytes()
    for path in WANTED:
        os.utime(project / path, (10**9, 10**9))
    make(project, output)
    assert output.read_bytes() == first


def test_unpacked_submission_packs_to_the_same_bytes(project: Path, tmp_path: Path) -> None:
    output = project / make_submission.ZIP_NAME
    make(project, output)
    again = tmp_path / "again"
    shutil.unpack_archive(output, again, "zip")
    for path in EXECUTABLE:  # unzip restores these, Python's unpacking does not
        (again / path).chmod(0o755)
    make(again, again / output.name)
    assert (again / output.name).read_bytes() == output.read_bytes()


def test_large_file_is_left_out_with_its_size(project: Path) -> None:
    os.truncate(write(project, "reports/data/huge.json"), 123_400_000)
    os.truncate(write(project, "reports/data/fits.json"), make_submission.LARGEST_BYTES)
    members, left_out = packed(project)
    assert left_out["reports/data/huge.json"] == "123.4 MB"
    assert "reports/data/fits.json" in members


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("nowhere", "broken link"),
        ("link", "broken link"),
        ("../outside.txt", "link out of the project"),
        ("tests", "link to a folder"),
        (".env", "link to: may hold a key"),
        ("notes.txt", None),
    ],
)
def test_links(project: Path, target: str, reason: str | None) -> None:
    write(project, "../outside.txt")
    (project / "link").symlink_to(target)
    members, left_out = packed(project)
    assert left_out.get("link") == reason
    assert ("link" in members) == (reason is None)


def test_pipe_and_unreadable_name_are_left_out(project: Path) -> None:
    os.mkfifo(project / "tests/pipe")
    latin = os.fsdecode(b"tests/caf\xe9.txt")
    (project / latin).write_text("x")
    _, left_out = packed(project)
    if (project / ".git").exists():
        assert "tests/pipe" not in left_out  # git never lists one
    else:
        assert left_out["tests/pipe"] == "not a plain file"
    assert left_out[latin] == "name cannot be stored in a zip"


def test_own_leftovers_are_not_packed(project: Path) -> None:
    write(project, f".{make_submission.ZIP_NAME}.tmp123")
    packed(project)
    members, _ = packed(project)
    assert sorted(members) == sorted(WANTED)


def test_deleted_tracked_file_is_no_failure(project: Path) -> None:
    (project / "tests/build/data.json").unlink()
    members, _ = packed(project)
    assert set(members) == set(WANTED) - {"tests/build/data.json"}


def test_repository_inside_is_packed(project: Path) -> None:
    write(project, "cs336-basics/vendored/a.py")
    git(project / "cs336-basics/vendored", "init", "-q")
    members, left_out = packed(project)
    assert "cs336-basics/vendored/a.py" in members
    assert left_out["cs336-basics/vendored/.git/"] == "version control"


def test_part_of_a_larger_checkout_is_walked(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    write(tmp_path, ".gitignore", "*")
    for path in WANTED:
        write(tmp_path / "inner", path)
    make(tmp_path / "inner", tmp_path / "a.zip")
    assert sorted(zipfile.ZipFile(tmp_path / "a.zip").namelist()) == sorted(WANTED)


# --- failures ---


@pytest.mark.parametrize("path", [*REQUIRED_FILES, "tests", "benchmarks"])
def test_missing_path_is_named_and_the_old_zip_kept(
    project: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = write(project, make_submission.ZIP_NAME, "old")
    gone = project / path
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert make_submission.main(["--root", str(project)]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"make_submission: {path}")
    assert "must be in the submission and is not" in said
    assert "\n" not in said
    assert output.read_text() == "old"
    assert not list(project.glob(f".{output.name}.*"))


def zip_of(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return path


COMPLETE = sorted([*REQUIRED_FILES, "tests/a.py", "benchmarks/a.py"])


@pytest.mark.parametrize(
    ("names", "expected", "complaint"),
    [
        (COMPLETE, [*COMPLETE, "a.txt"], "a.txt is missing from the zip"),
        ([*COMPLETE, "a.txt"], COMPLETE, "a.txt is in the zip and should not be"),
        ([*COMPLETE, "a.pt"], [*COMPLETE, "a.pt"], "a.pt must not be in the submission"),
        ([*COMPLETE, ".venv/a"], [*COMPLETE, ".venv/a"], ".venv/a must not be in the submission"),
    ],
)
def test_check_compares_names(
    tmp_path: Path, names: list[str], expected: list[str], complaint: str
) -> None:
    with pytest.raises(SubmissionError, match=complaint):
        check_zip(zip_of(tmp_path / "a.zip", names), expected)


def test_check_finds_a_damaged_member(tmp_path: Path) -> None:
    written = zip_of(tmp_path / "a.zip", COMPLETE)
    check_zip(written, COMPLETE)
    content = written.read_bytes()
    # The first member's content follows its name, which is the same text.
    written.write_bytes(content.replace(COMPLETE[0].encode() * 2, COMPLETE[0].encode() + b"?" * 9))
    assert len(written.read_bytes()) == len(content)
    with pytest.raises(SubmissionError, match=f"{COMPLETE[0]} is damaged"):
        check_zip(written, COMPLETE)


def test_check_refuses_what_is_no_zip(tmp_path: Path) -> None:
    with pytest.raises(SubmissionError, match="must be readable"):
        check_zip(write(tmp_path, "a.zip"), COMPLETE)


def test_summary_lists_everything_asked_for(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_submission.main(["--root", str(project), "--list"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[: len(WANTED)] == sorted(WANTED)
    assert any(line.split()[:2] == ["reports/", "3"] for line in said)
    assert any("left out: runs/a.pt (checkpoint)" in line for line in said)
    assert any(line.startswith(f"submission: {len(WANTED)} files") for line in said)


# --- names ---

FOLDER = st.sampled_from(["build", "data", "dist", "lib", "env", "out", "reports", "checkpoints"])
SUFFIX = st.sampled_from([".json", ".txt", ".py", ".png", ".html", ".md", ".csv", ".sh", ""])


@given(folders=st.lists(FOLDER, max_size=4), stem=st.text("abz_-. ", min_size=1), suffix=SUFFIX)
@example(folders=["reports", "build"], stem="a", suffix=".json")
@example(folders=[], stem="requirements", suffix=".txt")
def test_ordinary_names_are_never_dropped(folders: list[str], stem: str, suffix: str) -> None:
    assert make_submission.why_named_out("/".join([*folders, f"x{stem}{suffix}"])) is None


@given(
    folders=st.lists(FOLDER, max_size=3),
    inner=st.sampled_from([*make_submission.FOLDERS, "a.egg-info"]),
    name=st.sampled_from(["a.py", "b.json", "c"]),
)
def test_caches_and_environments_are_dropped_at_any_depth(
    folders: list[str], inner: str, name: str
) -> None:
    assert make_submission.why_named_out("/".join([*folders, inner, name])) is not None
