"""The command that writes a report: what is there afterwards, and that nothing is half there."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import report_fixtures as fx

from cs336_systems.report.__main__ import main
from cs336_systems.report.frame import load

MODEL = {
    "size": "small",
    "context": 256,
    "precision": "fp32",
    "compile": "eager",
    "pass": "forward",
}


def small(**changes: Any) -> dict[str, Any]:
    """Return a file with one table only and one study with a picture."""
    sweep = [fx.timed("sweep", {"n": n}, 0.01 * n) for n in (1, 2, 4)]
    stopped = fx.untimed("sweep", {"n": 8}, "oom", reason="asked for <9> GiB")
    return fx.document(fx.timed("model_pass", MODEL, 0.01), *sweep, stopped, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class _Page(HTMLParser):
    """Collects what a page refers to and checks that its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.images: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found["id"]} if "id" in found else set()
        self.links += [found["href"]] if "href" in found else []
        self.images += [found["src"]] if "src" in found else []
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_report_holds_every_table_picture_and_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fx.write(tmp_path / "run.json", small())
    assert main([str(path), "--out", str(tmp_path / "reports"), "--title", "A <title>"]) == 0
    assert capsys.readouterr().err == ""
    files = contents(tmp_path / "reports")
    assert set(files) == {
        "README.md", "report.html", "tables/model_pass.md", "tables/model_pass.csv",
        "tables/sweep.md", "tables/sweep.csv", "plots/model_pass_time_by_size.png",
        "plots/sweep_time.png",
    }  # fmt: skip
    targets = re.findall(r"\]\(([^)]+)\)", files["README.md"].decode())
    assert set(targets) - {"../run.json"} == set(files) - {"README.md"}
    page = _Page(files["report.html"].decode())
    assert page.open == []
    assert {link.removeprefix("#") for link in page.links} == page.ids == {"model_pass", "sweep"}
    assert [base64.b64decode(image.partition(",")[2]) for image in page.images] == [
        files["plots/model_pass_time_by_size.png"], files["plots/sweep_time.png"]
    ]  # fmt: skip
    assert "OOM" in page.cells
    assert "A &lt;title&gt;" in files["report.html"].decode()
    assert "asked for &lt;9&gt; GiB" in files["report.html"].decode()


def test_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    main([str(fx.write(tmp_path / "run.json", small())), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)|url\(|@import|https?:""", text)
    assert "prefers-color-scheme: dark" in text
    assert "overflow-x: auto" in text


def test_csv_has_full_precision_and_the_stamp_in_every_row(tmp_path: Path) -> None:
    main([str(fx.write(tmp_path / "run.json", small())), "--out", str(tmp_path / "out")])
    table = pd.read_csv(tmp_path / "out" / "tables" / "sweep.csv")
    assert list(table["n"]) == [1, 2, 4, 8]
    assert list(table["status"]) == ["ok", "ok", "ok", "oom"]
    assert table["median_ms"][2] == pytest.approx(40, rel=1e-12)
    stamped = ["device_name", "driver", "cuda", "torch", "triton", "python", "commit", "command"]
    assert table[stamped].notna().all(axis=None)
    assert not {"source", "hardware", "data_ms", "case"} & set(table.columns)
    assert str(tmp_path) not in table.to_csv()


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    path = fx.write(tmp_path / "run.json", small())
    for name in ("one", "two"):
        command = [sys.executable, "-m", "cs336_systems.report", str(path)]
        subprocess.run([*command, "--out", str(tmp_path / name)], check=True, capture_output=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_readme_is_filled_and_filling_again_changes_nothing(tmp_path: Path) -> None:
    path = fx.write(tmp_path / "run.json", small())
    readme = tmp_path / "README.md"
    marks = [f"<!-- report:{end} {part} -->" for part in ("headline", "studies") for end in _ENDS]
    readme.write_text("\n".join(["# Us", *marks, "end"]))
    readme.chmod(0o640)
    arguments = [str(path), "--out", str(tmp_path / "reports"), "--readme", str(readme)]
    assert main(arguments) == 0
    first = readme.read_bytes()
    assert b"Median ms of each pass" in first
    assert b"(reports/plots/sweep_time.png)" in first
    assert readme.stat().st_mode & 0o777 == 0o640
    assert main(arguments) == 0
    assert readme.read_bytes() == first


_ENDS = ("begin", "end")


def test_unusable_input_leaves_an_earlier_report_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out = fx.write(tmp_path / "good.json", small()), tmp_path / "out"
    main([str(good), "--out", str(out)])
    before, around = contents(out), sorted(tmp_path.iterdir())
    data = small()
    data["benchmarks"][2]["stats"]["median"] = float("nan")
    spoiled = fx.write(tmp_path / "spoiled.json", data)
    capsys.readouterr()
    assert main([str(good), str(spoiled), "--out", str(out)]) == 2
    said = capsys.readouterr()
    rule = "benchmarks[2].stats.median must be a positive number, got nan"
    assert (said.out, said.err) == ("", f"report: {spoiled}: {rule}\n")
    assert contents(out) == before
    spoiled.unlink()
    assert sorted(tmp_path.iterdir()) == around


@pytest.mark.parametrize("readme", ["missing.md", "unmarked.md", "binary.md"])
def test_unusable_readme_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], readme: str
) -> None:
    path = fx.write(tmp_path / "run.json", small())
    (tmp_path / "unmarked.md").write_text("# nothing here\n")
    (tmp_path / "binary.md").write_bytes(b"\xff\xfe")
    arguments = [str(path), "--out", str(tmp_path / "out"), "--readme", str(tmp_path / readme)]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"report: {tmp_path / readme}: ")
    assert not (tmp_path / "out").exists()


def test_failing_write_leaves_no_half_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, written = fx.write(tmp_path / "run.json", small()), []

    def full(self: Path, data: bytes) -> int:
        written.append(self)
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(self))
        return len(data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be read or written: No space left on device" in capsys.readouterr().err
    assert len(written) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_out_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = fx.write(tmp_path / "run.json", small())
    assert main([str(path), "--out", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be read or written" in line


def test_files_of_an_earlier_report_are_named_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "tables").mkdir(parents=True)
    (out / "tables" / "gone.md").write_text("old")
    main([str(fx.write(tmp_path / "run.json", small())), "--out", str(out)])
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line
        == f"report: {out / 'tables' / 'gone.md'} is of an earlier report and was left as it is"
    )
    assert (out / "tables" / "gone.md").read_text() == "old"


def test_command_says_what_it_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(fx.write(tmp_path / f"{name}.json", small())) for name in "ab"]
    main([*files, "--out", str(tmp_path / "out")])
    said = f"report: {files[1]}: 5 cases measured again replace those of {files[0]}\n"
    assert capsys.readouterr().err == said


def test_half_a_thousand_cases_take_less_than_ten_seconds(tmp_path: Path) -> None:
    path = fx.write(tmp_path / "run.json", fx.everything())
    start = time.process_time()
    assert main([str(path), "--out", str(tmp_path / "out")]) == 0
    # The requirement itself, as processor time: a busy neighbour must not fail it.
    assert time.process_time() - start < 10
    assert len(load([path]).cases) > 500
    assert len(list((tmp_path / "out" / "plots").iterdir())) <= 16
