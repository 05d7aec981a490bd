"""A large file over HTTP that arrives whole or not at all: retried, resumed, checked, renamed."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cs336_systems.durable import commit
from cs336_systems.errors import UsageError
from cs336_systems.train.atomic import refused

CHUNK_BYTES = 1 << 20
# Answers that a later try may change; any other 4xx is final.
_TRANSIENT = {408, 425, 429}


class DownloadError(UsageError):
    """The file could not be had; `str(error)` is one line fit for a terminal."""


class _TryAgainError(Exception):
    """This try failed in a way that the next one may not."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a download keeps trying."""

    # Tries in a row that brought no byte.
    num_attempts: int = 6
    # Before the second try; doubled for each further one.
    backoff_s: float = 1.0
    timeout_s: float = 30.0


def download(
    url: str, path: Path, *, sha256: str | None = None, patience: Patience | None = None
) -> Path:
    """Fetch `url` into `path` unless it is there already, continuing an interrupted download.

    A checksum that the server announces with a redirect (`X-Linked-ETag`) counts as known.
    Raises: DownloadError when the server refuses, stays unreachable or sends other bytes than
        `sha256`; whatever `path` held before is still there.
    """
    if path.exists() and (sha256 is None or file_sha256(path) == sha256):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    fetch = _Fetch(url, path, sha256, patience or Patience())
    fetch.run()
    if not fetch.is_expected():
        # The part may go back to a run that wrote rubbish: once more, from the first byte.
        fetch.restart()
        fetch.run()
    if not fetch.is_expected():
        fetch.restart()
        raise DownloadError(f"download: {url} must have sha256 {fetch.sha256}, got {fetch.got}")
    commit(fetch.part, path)
    fetch.tag_path.unlink(missing_ok=True)
    return path


def file_sha256(path: Path) -> str:
    """Return the file's sha256 as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Fetch:
    """One file on its way: the part on disk, and what is known of the whole."""

    def __init__(self, url: str, path: Path, sha256: str | None, patience: Patience) -> None:
        self.url, self.sha256, self.patience = url, sha256, patience
        self.part = path.with_name(path.name + ".part")
        # Says which version of the file the part belongs to, for the next run.
        self.tag_path = path.with_name(path.name + ".part.etag")
        self.got = ""
        self.opener = urllib.request.build_opener(_AnnouncedChecksum(self))

    def restart(self) -> None:
        """Forget what has arrived."""
        self.part.unlink(missing_ok=True)
        self.tag_path.unlink(missing_ok=True)

    def is_expected(self) -> bool:
        """Return whether the part is the whole file, as far as that can be known."""
        if self.sha256 is None:
            return True
        self.got = file_sha256(self.part)
        return self.got == self.sha256

    def run(self) -> None:
        """Try until the part is complete.

        Raises: DownloadError for a final refusal, or when too many tries bring nothing.
        """
        failures = 0
        while True:
            before = self._num_bytes()
            try:
                return self._attempt(before)
            except _TryAgainError as error:
                failures = 0 if self._num_bytes() > before else failures + 1
                if failures >= self.patience.num_attempts:
                    raise DownloadError(
                        f"download: {self.url} failed {failures} times in a row: {error}"
                    ) from error
            time.sleep(self.patience.backoff_s * 2 ** max(failures - 1, 0))

    def _attempt(self, num_bytes: int) -> None:
        try:
            with self.opener.open(
                self._request(num_bytes), timeout=self.patience.timeout_s
            ) as answer:
                start, total = self._range(answer, num_bytes)
                self._remember(answer.headers.get("ETag"))
                self._receive(answer, start, total)
        except urllib.error.HTTPError as error:
            self._refused(error, num_bytes)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise _TryAgainError(f"{type(error).__name__}: {reason}") from error

    def _request(self, num_bytes: int) -> urllib.request.Request:
        request = urllib.request.Request(self.url, headers={"Accept-Encoding": "identity"})
        if num_bytes:
            request.add_header("Range", f"bytes={num_bytes}-")
            if self.tag_path.exists():
                request.add_header("If-Range", self.tag_path.read_text())
        return request

    def _num_bytes(self) -> int:
        """How much of the part can be continued: bytes of unknown origin need a checksum."""
        known = self.tag_path.exists() or self.sha256 is not None
        return self.part.stat().st_size if known and self.part.exists() else 0

    def _range(self, answer: Any, num_bytes: int) -> tuple[int, int | None]:
        """Return where in the file the answer starts, and the file's size if it is said."""
        if answer.status == 206:
            said = re.fullmatch(
                r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", "")
            )
            if said is None or int(said[1]) != num_bytes:
                self.restart()
                raise _TryAgainError("the server answered with another range than asked")
            return num_bytes, None if said[2] == "*" else int(said[2])
        length = answer.headers.get("Content-Length")
        return 0, None if length is None else int(length)

    def _remember(self, tag: str | None) -> None:
        # Weak tags do not promise equal bytes, and If-Range refuses them.
        if tag and not tag.startswith("W/"):
            self.tag_path.write_text(tag)
        else:
            self.tag_path.unlink(missing_ok=True)

    def _receive(self, answer: Any, start: int, total: int | None) -> None:
        with (
            _open(self.part, "r+b" if start else "wb") as file,
            _progress(self.part.stem, start, total) as bar,
        ):
            file.seek(start)
            arrived = start
            # read1 hands over what came before a connection broke; read would wait for it all.
            while chunk := answer.read1(CHUNK_BYTES):
                _write(self.part, file, chunk)
                arrived += len(chunk)
                bar.update(len(chunk))
            os.fsync(file.fileno())
        if total is not None and arrived != total:
            raise _TryAgainError(f"the connection ended after {arrived} of {total} bytes")

    def _refused(self, error: urllib.error.HTTPError, num_bytes: int) -> None:
        with error:
            if error.code == 416 and num_bytes:
                if error.headers.get("Content-Range") == f"bytes */{num_bytes}":
                    return  # the last byte had arrived before the earlier run ended
                self.restart()
                raise _TryAgainError("the part on disk is longer than the file") from error
            if error.code < 500 and error.code not in _TRANSIENT:
                raise DownloadError(
                    f"download: {self.url} refused: HTTP {error.code} {error.reason}"
                ) from error
            raise _TryAgainError(f"HTTP {error.code} {error.reason}") from error


class _AnnouncedChecksum(urllib.request.HTTPRedirectHandler):
    """Reads the checksum off the redirect from a repository to its file store."""

    def __init__(self, fetch: _Fetch) -> None:
        self.fetch = fetch

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        tag = (headers.get("X-Linked-ETag") or "").strip('"')
        if self.fetch.sha256 is None and re.fullmatch(r"[0-9a-f]{64}", tag):
            self.fetch.sha256 = tag
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _progress(name: str, start: int, total: int | None) -> tqdm:
    """Show a bar, on a terminal only."""
    return tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name, disable=None)


def _open(path: Path, mode: str) -> Any:
    try:
        # Unbuffered: closing a buffer would try to write again, and fail with a second error.
        return path.open(mode, buffering=0)
    except OSError as error:
        raise refused(path, error) from error


def _write(path: Path, file: Any, chunk: bytes) -> None:
    """Write, keeping a full disk apart from a broken connection: both are OSErrors."""
    try:
        rest = memoryview(chunk)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise refused(path, error) from error
