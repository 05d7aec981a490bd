"""A git repository whose commits carry chosen times, for tests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

HOUR = 3600


class Repository:
    """A git repository whose commits carry chosen times."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments: str, hours: float = 0) -> str:
        when = f"{1_700_000_000 + int(hours * HOUR)} +0000"
        identity = {"NAME": "T", "EMAIL": "t@example.invalid", "DATE": when}
        environment = os.environ | {
            f"GIT_{role}_{name}": value
            for role in ("AUTHOR", "COMMITTER")
            for name, value in identity.items()
        }
        command = ["git", "-C", str(self.path), *arguments]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def write(self, path: str, text: str) -> None:
        (self.path / path).parent.mkdir(parents=True, exist_ok=True)
        (self.path / path).write_text(text)

    def commit(self, message: str, hours: float = 0) -> str:
        self.git("add", "--all")
        self.git("commit", "-q", "--allow-empty", "-m", message, hours=hours)
        return self.git("rev-parse", "HEAD")

    def num_worktrees(self) -> int:
        return len(self.git("worktree", "list").splitlines())
