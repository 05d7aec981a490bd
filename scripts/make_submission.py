"""Pack the project into one zip to hand in, and check the zip that was written.

In a git checkout the files are what git tracks or would track; elsewhere (an unpacked submission)
they are what a walk finds. Both leave out environments, caches, checkpoints, token files and very
large files, and say so. The same files always give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import os
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ZIP_NAME = "cs336-systems-submission.zip"
LARGEST_BYTES = 20 * 10**6

REQUIRED_FILES = (
    "README.md",
    "conftest.py",
    "cs336-basics/cs336_basics/model.py",
    "cs336_systems/__init__.py",
    "pyproject.toml",
    "run_benchmarks.sh",
    "test_and_make_submission.sh",
    "test_results.xml",
)
REQUIRED_FOLDERS = ("benchmarks", "tests")

# Ignored by git, or possibly so, and wanted all the same.
ALWAYS = ("test_results.xml", "reports")

# Names that mean the same wherever they stand; `build`, `data` and `env` do not, so they are kept.
FOLDERS = {
    ".git": "version control",
    ".venv": "environment",
    "venv": "environment",
    "node_modules": "environment",
    "__pycache__": "cache",
    ".pytest_cache": "cache",
    ".mypy_cache": "cache",
    ".ruff_cache": "cache",
    ".hypothesis": "cache",
    ".benchmarks": "cache",
    ".ipynb_checkpoints": "cache",
}
TOP_FOLDERS = {
    "out": "made by the scripts",
    "data": "data set",
    "artifacts": "made by training",
    "checkpoints": "made by training",
    "wandb": "made by training",
}
SUFFIXES = {
    ".pt": "checkpoint",
    ".pth": "checkpoint",
    ".ckpt": "checkpoint",
    ".safetensors": "checkpoint",
    ".pickle": "snapshot",
    ".pkl": "snapshot",
    ".npy": "token file",
    ".pyc": "cache",
}
NAMES = {
    ".git": "version control",
    ".env": "may hold a key",
    ".netrc": "may hold a key",
    ".DS_Store": "cache",
}


class SubmissionError(Exception):
    """The submission cannot be made; `str(error)` is one line fit for a terminal."""


class LeftOut(NamedTuple):
    """A path that is not packed, and why."""

    path: str
    reason: str


class Selection(NamedTuple):
    """What is packed and what is not, both sorted by path."""

    files: list[str]
    left_out: list[LeftOut]


def why_named_out(path: str) -> str | None:
    """Return why a path's name alone keeps it out, None when it does not."""
    *folders, name = PurePosixPath(path).parts
    for folder in folders:
        if folder in FOLDERS or folder.endswith(".egg-info"):
            return FOLDERS.get(folder, "cache")
    return NAMES.get(name) or SUFFIXES.get(PurePosixPath(name).suffix.lower())


def why_folder_out(root: Path, folder: PurePosixPath) -> str | None:
    """Return why a whole folder is left out, None when it is not."""
    # An environment may have any name; these make it one.
    if (root / folder / "pyvenv.cfg").is_file() or (root / folder / "conda-meta").is_dir():
        return "environment"
    return why_named_out(f"{folder}/-")


def folder_left_out(root: Path, path: str) -> LeftOut | None:
    """Return the outermost folder that keeps a path out, so that an environment is one line."""
    for folder in reversed(PurePosixPath(path).parents[:-1]):
        if reason := why_folder_out(root, folder):
            return LeftOut(f"{folder}/", reason)
    return None


def why_unfit(root: Path, path: str) -> str | None:
    """Return why what lies at a path cannot be packed, None when it can."""
    full = root / path
    if not is_utf8(path):
        return "name cannot be stored in a zip"
    if full.is_symlink():
        target, top = real(full), real(root)
        if not target.exists():
            return "broken link"
        if not target.is_relative_to(top):
            return "link out of the project"
        if target.is_dir():
            return "link to a folder"
        reason = why_named_out(target.relative_to(top).as_posix())
        if reason is not None:
            return f"link to: {reason}"
    if not full.is_file():
        return "not a plain file"
    size = full.stat().st_size
    return f"{size / 1e6:.1f} MB" if size > LARGEST_BYTES else None


def real(path: Path) -> Path:
    """Follow links; unlike Path.resolve it survives a link to itself."""
    return Path(os.path.realpath(path))


def is_utf8(path: str) -> bool:
    """Say whether a file name came from valid UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- finding the files ---


def select(root: Path, output: Path) -> Selection:
    """Choose what is packed from the tree at `root`; `output` is never packed into itself."""
    listed = listed_by_git(root)
    left_out: dict[str, str] = {}
    candidates: set[str] = set()
    if listed is None:
        candidates.update(walk(root, ".", left_out))
    for path in [*(listed or ()), *ALWAYS]:
        # A repository inside this one is listed as a folder.
        if (root / path).is_dir() and not (root / path).is_symlink():
            candidates.update(walk(root, path, left_out))
        elif os.path.lexists(root / path):
            candidates.add(PurePosixPath(path).as_posix())
    files = []
    for path in sorted(candidates):
        own = real(root / path) == real(output) or f".{output.name}." in path
        if outer := folder_left_out(root, path):
            left_out[outer.path] = outer.reason
        elif reason := why_named_out(path) or why_unfit(root, path):
            left_out[path] = reason
        elif not own:
            files.append(path)
    return Selection(files, [LeftOut(path, left_out[path]) for path in sorted(left_out)])


def listed_by_git(root: Path) -> list[str] | None:
    """List what git tracks or would track, None when `root` is not a checkout of its own.

    Only the project's own ignore files count: a user's global ones may hide `build` or `*.json`.
    """
    if not (root / ".git").exists():
        return None
    command = ["ls-files", "-z", "--cached", "--others", "--exclude-per-directory=.gitignore"]
    try:
        done = subprocess.run(["git", "-C", root, *command], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    if done.returncode != 0:
        raise SubmissionError(f"git must list the files: {done.stderr.decode().strip()}")
    return [os.fsdecode(path) for path in done.stdout.split(b"\0") if path]


def walk(root: Path, start: str, left_out: dict[str, str]) -> Iterator[str]:
    """Yield every path below `start`, noting in `left_out` the folders that are not entered."""
    for opened, subfolders, names in os.walk(root / start):
        here = PurePosixPath(Path(opened).relative_to(root).as_posix())
        entered = []
        for name in subfolders:
            folder = here / name
            reason = TOP_FOLDERS.get(str(folder)) or why_folder_out(root, folder)
            if (root / folder).is_symlink():
                names.append(name)
            elif reason is not None:
                left_out[f"{folder}/"] = reason
            else:
                entered.append(name)
        subfolders[:] = entered
        yield from (str(here / name) for name in names)


# --- writing and checking ---


def write_zip(root: Path, files: Iterable[str], output: Path) -> None:
    """Write the files in order, with times fixed and only the executable bit kept."""
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in files:
            source = root / path
            executable = source.stat().st_mode & stat.S_IXUSR
            member = zipfile.ZipInfo(path)
            member.create_system = 3  # Unix: the upper half of external_attr is a mode
            member.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, source.read_bytes())


def check_zip(zip_path: Path, expected: list[str]) -> None:
    """Open a written zip again and hold it against what it must and must not contain.

    Raises: SubmissionError naming the first path that breaks a rule.
    """
    try:
        with zipfile.ZipFile(zip_path) as archive:
            names, damaged = archive.namelist(), archive.testzip()
    except zipfile.BadZipFile as error:
        raise SubmissionError(f"the zip must be readable: {error}") from error
    if damaged is not None:
        raise SubmissionError(f"{damaged} is damaged in the zip")
    for name, count in Counter(names).items():
        if count > 1:
            raise SubmissionError(f"{name} is in the zip {count} times")
    for difference, what in (
        (set(expected) - set(names), "is missing from the zip"),
        (set(names) - set(expected), "is in the zip and should not be"),
        (set(REQUIRED_FILES) - set(names), "must be in the submission and is not"),
        ({name for name in names if why_named_out(name)}, "must not be in the submission"),
    ):
        if difference:
            raise SubmissionError(f"{min(difference)} {what}")
    for folder in REQUIRED_FOLDERS:
        if not any(name.startswith(f"{folder}/") for name in names):
            raise SubmissionError(f"{folder}/ must be in the submission and is not")


def make(root: Path, output: Path) -> Selection:
    """Select, write, check; `output` changes only once all of it has passed."""
    selection = select(root, output)
    handle, part = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    os.close(handle)
    try:
        write_zip(root, selection.files, Path(part))
        check_zip(Path(part), selection.files)
        os.chmod(part, 0o644)
        os.replace(part, output)
    finally:
        Path(part).unlink(missing_ok=True)
    return selection


# --- telling ---


def summary(root: Path, selection: Selection, output: Path) -> Iterator[str]:
    """Yield lines: a row for each folder at the top, the total, and what was left out."""
    num_files: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for path in selection.files:
        first, slash, _ = path.partition("/")
        top = first + slash if slash else "(top level)"
        num_files[top] += 1
        num_bytes[top] += (root / path).stat().st_size
    for top in sorted(num_files):
        yield f"  {top:<20} {num_files[top]:>5} files {num_bytes[top] / 1e3:>10.1f} kB"
    # Caches are no loss to anyone.
    for path, reason in selection.left_out:
        if reason != "cache":
            yield f"  left out: {path} ({reason})"
    total, packed = num_bytes.total() / 1e6, output.stat().st_size / 1e6
    yield f"submission: {num_files.total()} files, {total:.2f} MB, {packed:.2f} MB packed, checked"
    yield f"submission: {output}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="make_submission", description=description)
    parser.add_argument("--root", type=Path, default=ROOT, help="the project (default: this one)")
    parser.add_argument("--output", type=Path, help=f"the zip to write (default: ROOT/{ZIP_NAME})")
    parser.add_argument("--list", action="store_true", help="print every path that was packed")
    args = parser.parse_args(argv)
    output = args.output or args.root / ZIP_NAME
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a left-out name may be no text at all
    try:
        selection = make(args.root, output)
    except (SubmissionError, OSError) as error:
        kept = f" ({output} is left as it was)" if output.exists() else ""
        print(f"make_submission: {error}{kept}", file=sys.stderr)
        return 1
    if args.list:
        print(*selection.files, sep="\n")
    print(*summary(args.root, selection, output), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
