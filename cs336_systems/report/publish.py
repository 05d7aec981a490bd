"""Make a report and put it in place: all of it is written aside first, so nothing is half there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from cs336_systems.errors import UsageError
from cs336_systems.report.frame import Frame
from cs336_systems.report.page import page
from cs336_systems.report.palette import Palette
from cs336_systems.report.plots import pictures
from cs336_systems.report.readme import Gallery, fill, index
from cs336_systems.report.tables import Section, markdown, sections

# The folders that hold a report's own files, and what those end in.
_OWN = {"tables": (".md", ".csv"), "plots": (".png",)}


def publish(frame: Frame, out: Path, title: str, readme: Path | None = None) -> list[str]:
    """Write the report of a frame into a folder; return what the user should know.

    Raises: UsageError when something cannot be written or a README has no place for the report.
    """
    made = sections(frame)
    palette = Palette([row for section in made for row in section.rows])
    gallery = {section.name: pictures(section, palette) for section in made}
    try:
        out = out.resolve()
        groups = {out.parent: _files(frame, out, title, made, gallery)}
        stale = _stale(out, groups[out.parent])
        if readme is not None:
            text = fill(readme, _read(readme), made, gallery, out)
            folder = groups.setdefault(readme.resolve().parent, {})
            folder[readme.resolve()] = text.encode()
        replace_files(groups)
    except OSError as error:
        where = error.filename or out
        raise UsageError(f"report: {where}: cannot be read or written: {error.strerror}") from None
    return [f"report: {path} is of an earlier report and was left as it is" for path in stale]


def _files(
    frame: Frame, out: Path, title: str, made: Sequence[Section], gallery: Gallery
) -> dict[Path, bytes]:
    files = {
        out / "README.md": index(title, frame, made, gallery, out),
        out / "report.html": page(title, made, gallery),
    }
    for section in made:
        files[out / "tables" / f"{section.name}.md"] = markdown(section)
        files[out / "tables" / f"{section.name}.csv"] = frame.csv(section.rows)
    images = [picture for section in made for picture in gallery[section.name]]
    return {path: text.encode() for path, text in files.items()} | {
        out / "plots" / f"{picture.name}.png": picture.png for picture in images
    }


def _read(readme: Path) -> str:
    try:
        # Bytes, because reading as text would change a README's line ends.
        return readme.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"report: {readme}: must be UTF-8 text, got other bytes") from None


def _stale(out: Path, files: Mapping[Path, bytes]) -> list[Path]:
    found = [
        path
        for folder, ends in _OWN.items()
        if (out / folder).is_dir()
        for path in sorted((out / folder).iterdir())
        if path.suffix in ends
    ]
    return [path for path in found if path not in files]


def replace_files(groups: Mapping[Path, Mapping[Path, bytes]]) -> None:
    """Write files all or none as far as a file system can: each group is staged in its folder."""
    with ExitStack() as stack:
        staged: list[tuple[Path, Path]] = []
        for folder, files in groups.items():
            folder.mkdir(parents=True, exist_ok=True)
            stage = Path(stack.enter_context(TemporaryDirectory(dir=folder, prefix=".report-")))
            for number, (path, data) in enumerate(files.items()):
                staged.append((stage / str(number), path))
                staged[-1][0].write_bytes(data)
        for _, path in staged:
            path.parent.mkdir(parents=True, exist_ok=True)
        for temporary, path in staged:
            if path.exists():
                shutil.copymode(path, temporary)
            os.replace(temporary, path)
