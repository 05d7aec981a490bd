"""A local HTTP server that serves one file badly, in ways chosen per request."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Faulty:
    """What the server holds, what it will do wrong, and what it has been asked."""

    body: bytes
    # For each request in turn; after the last one the server behaves.
    faults: list[str] = field(default_factory=list)
    # How much arrives before a connection is dropped.
    drop_after: int = 1000
    etag: str | None = '"v1"'
    announced: str | None = None
    url: str = ""
    # The Range header of each request.
    ranges: list[str | None] = field(default_factory=list)


@contextmanager
def serving(faulty: Faulty) -> Iterator[Faulty]:
    """Serve `faulty.body` at `faulty.url` until the block ends."""
    handler = type("Handler", (_Handler,), {"faulty": faulty})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    faulty.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield faulty
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    faulty: Faulty

    def do_GET(self) -> None:
        faulty = self.faulty
        if self.path.startswith("/linked/"):
            return self._redirect(self.path.removeprefix("/linked"))
        faulty.ranges.append(self.headers["Range"])
        fault = faulty.faults.pop(0) if faulty.faults else ""
        if fault.isdigit():
            return self.send_error(int(fault))
        if fault == "hang up":
            return self.connection.close()
        return self._send(fault)

    def _redirect(self, path: str) -> None:
        self.send_response(302)
        self.send_header("Location", path)
        self.send_header("X-Linked-ETag", f'"{self.faulty.announced}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, fault: str) -> None:
        body, start = self.faulty.body, 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        is_same = self.headers["If-Range"] in (None, self.faulty.etag)
        if asked and is_same and fault != "ignore range":
            start = int(asked[1])
            if start >= len(body):
                return self._unsatisfiable()
            self.send_response(206)
            said = start + (fault == "wrong range")
            self.send_header("Content-Range", f"bytes {said}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if self.faulty.etag:
            self.send_header("ETag", self.faulty.etag)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        if fault == "rubbish":
            rest = bytes(byte ^ 1 for byte in rest)
        self.wfile.write(rest[: self.faulty.drop_after] if fault == "drop" else rest)
        return None

    def _unsatisfiable(self) -> None:
        self.send_response(416)
        self.send_header("Content-Range", f"bytes */{len(self.faulty.body)}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Keep the test's output clean."""
