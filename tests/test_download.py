"""Does a download arrive whole, or not at all, whatever the server does?"""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
from http_faults import Faulty, serving

from cs336_systems.errors import UsageError
from cs336_systems.train.download import DownloadError, Patience, download

BODY = random.Random(0).randbytes(3500)
SHA256 = hashlib.sha256(BODY).hexdigest()
QUICK = Patience(num_attempts=3, backoff_s=0.001, timeout_s=5)


def fetch(faulty: Faulty, path: Path, sha256: str | None = SHA256) -> Path:
    return download(f"{faulty.url}/text", path, sha256=sha256, patience=QUICK)


def test_a_dropped_connection_is_continued_where_it_broke(tmp_path: Path) -> None:
    with serving(Faulty(BODY, ["drop"] * 3)) as faulty:
        path = fetch(faulty, tmp_path / "text")
    assert path.read_bytes() == BODY
    assert faulty.ranges == [None, "bytes=1000-", "bytes=2000-", "bytes=3000-"]
    assert os.listdir(tmp_path) == ["text"]


def test_progress_renews_patience(tmp_path: Path) -> None:
    with serving(Faulty(BODY, ["drop"] * 34, drop_after=100)) as faulty:
        assert fetch(faulty, tmp_path / "text").read_bytes() == BODY
    assert len(faulty.ranges) == 35


@pytest.mark.parametrize("fault", ["500", "503", "429", "hang up"])
def test_a_passing_fault_is_tried_again(tmp_path: Path, fault: str) -> None:
    with serving(Faulty(BODY, [fault, fault])) as faulty:
        assert fetch(faulty, tmp_path / "text").read_bytes() == BODY
    assert len(faulty.ranges) == 3


@pytest.mark.parametrize("sha256", [SHA256, None])
@pytest.mark.parametrize("fault", ["ignore range", "wrong range"])
def test_a_server_that_mishandles_ranges(tmp_path: Path, fault: str, sha256: str | None) -> None:
    with serving(Faulty(BODY, ["drop", fault])) as faulty:
        assert fetch(faulty, tmp_path / "text", sha256).read_bytes() == BODY
    assert faulty.ranges[:2] == [None, "bytes=1000-"]


def test_a_later_run_continues_the_part(tmp_path: Path) -> None:
    with serving(Faulty(BODY, ["drop", "503", "503", "503"])) as faulty:
        with pytest.raises(DownloadError, match="failed 3 times in a row: HTTP 503"):
            fetch(faulty, tmp_path / "text", None)
        assert sorted(os.listdir(tmp_path)) == ["text.part", "text.part.etag"]
        assert fetch(faulty, tmp_path / "text", None).read_bytes() == BODY
    assert faulty.ranges[-1] == "bytes=1000-"
    assert os.listdir(tmp_path) == ["text"]


def test_a_part_of_another_version_is_not_continued(tmp_path: Path) -> None:
    (tmp_path / "text.part").write_bytes(b"old" * 100)
    (tmp_path / "text.part.etag").write_text('"v0"')
    with serving(Faulty(BODY)) as faulty:
        assert fetch(faulty, tmp_path / "text", None).read_bytes() == BODY
    assert faulty.ranges == ["bytes=300-"]


def test_a_part_of_unknown_version_is_fetched_anew(tmp_path: Path) -> None:
    (tmp_path / "text.part").write_bytes(b"old" * 100)
    with serving(Faulty(BODY, ["drop"], etag=None)) as faulty:
        assert fetch(faulty, tmp_path / "text", None).read_bytes() == BODY
    assert faulty.ranges == [None, None]


def test_a_part_that_was_complete_is_kept(tmp_path: Path) -> None:
    (tmp_path / "text.part").write_bytes(BODY)
    with serving(Faulty(BODY)) as faulty:
        assert fetch(faulty, tmp_path / "text").read_bytes() == BODY
    assert faulty.ranges == [f"bytes={len(BODY)}-"]


def test_a_part_longer_than_the_file_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "text.part").write_bytes(BODY + b"more")
    with serving(Faulty(BODY)) as faulty:
        assert fetch(faulty, tmp_path / "text").read_bytes() == BODY
    assert faulty.ranges == [f"bytes={len(BODY) + 4}-", None]


def test_a_spoilt_part_is_fetched_anew(tmp_path: Path) -> None:
    (tmp_path / "text.part").write_bytes(b"x" * 1000)
    with serving(Faulty(BODY)) as faulty:
        assert fetch(faulty, tmp_path / "text").read_bytes() == BODY
    assert faulty.ranges == ["bytes=1000-", None]


@pytest.mark.parametrize("before", [None, b"an older file"])
def test_a_wrong_checksum_leaves_what_was_there(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "text"
    if before:
        path.write_bytes(before)
    with (
        serving(Faulty(BODY, ["rubbish", "rubbish"])) as faulty,
        pytest.raises(DownloadError, match=f"must have sha256 {SHA256}, got [0-9a-f]{{64}}$"),
    ):
        fetch(faulty, path)
    assert len(faulty.ranges) == 2
    assert os.listdir(tmp_path) == (["text"] if before else [])
    assert not before or path.read_bytes() == before


@pytest.mark.parametrize("fault", ["rubbish", ""])
def test_the_checksum_on_a_redirect_is_checked(tmp_path: Path, fault: str) -> None:
    with serving(Faulty(BODY, [fault], announced=SHA256)) as faulty:
        url = f"{faulty.url}/linked/text"
        assert download(url, tmp_path / "text", patience=QUICK).read_bytes() == BODY
    assert len(faulty.ranges) == (2 if fault else 1)


@pytest.mark.parametrize("status", ["404", "403", "410"])
def test_a_refusal_is_final_and_one_line(tmp_path: Path, status: str) -> None:
    with (
        serving(Faulty(BODY, [status])) as faulty,
        pytest.raises(DownloadError, match=rf"/text refused: HTTP {status} ") as caught,
    ):
        fetch(faulty, tmp_path / "text")
    assert len(faulty.ranges) == 1
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_nobody_listens(tmp_path: Path) -> None:
    with serving(Faulty(BODY)) as faulty:
        pass
    with pytest.raises(DownloadError, match="failed 3 times in a row: URLError"):
        fetch(faulty, tmp_path / "text")


def test_a_file_that_is_there_is_not_asked_for(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(BODY)
    with serving(Faulty(BODY)) as faulty:
        fetch(faulty, tmp_path / "text")
        fetch(faulty, tmp_path / "text", None)
    assert faulty.ranges == []


def test_a_full_disk_is_one_line_and_not_tried_again(tmp_path: Path) -> None:
    # A device that answers each write with ENOSPC.
    (tmp_path / "text.part").symlink_to("/dev/full")
    with (
        serving(Faulty(BODY)) as faulty,
        pytest.raises(UsageError, match=r"text\.part cannot be written: No space left on device$"),
    ):
        fetch(faulty, tmp_path / "text")
    assert len(faulty.ranges) == 1
