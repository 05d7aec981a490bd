"""A copy of the project's shell that sees only recording stand-ins for Python and uv.

Its PATH holds a few system tools, so nothing is installed and no real interpreter is found.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("run_benchmarks.sh", "test_and_make_submission.sh", ".ci/run")
SOURCED = ("scripts/setup_env.sh", "scripts/pytest_args.sh")
TOOLS = (
    "awk",
    "bash",
    "cat",
    "date",
    "dirname",
    "grep",
    "mkdir",
    "mv",
    "rm",
    "sed",
    "tail",
    "tee",
    "touch",
)

# Records each call, then does the little of a real interpreter that the scripts look at.
FAKE_PYTHON = """\
import json, os, shutil, signal, sys
from pathlib import Path

argv, act = sys.argv[1:], os.environ.get
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([Path(sys.argv[0]).name, *argv]), file=calls)
if argv[0] == "-c":
    if "find_spec" in argv[1]:
        print(act("FAKE_MISSING", ""))
        sys.exit()
    exec(argv[1])
elif argv[:2] == ["-m", "venv"]:
    place = Path(argv[-1], "bin")
    place.mkdir(parents=True)
    shutil.copy(sys.argv[0], place / "python")
elif argv[:2] == ["-m", "pip"] or Path(sys.argv[0]).name == "uv":
    if "config" in argv:
        print(act("FAKE_PIP_CONFIG", ""))
    if argv[-1] == "uv" and act("FAKE_UV"):
        shutil.copy(sys.argv[0], Path(sys.argv[0]).parent / "uv")
    if argv[0] == "pip":
        seen = {name: value for name, value in os.environ.items() if name.startswith("UV_")}
        Path(os.environ["CALLS"] + ".uv").write_text(json.dumps(seen))
    if argv[-1] != "--version" and "config" not in argv:
        if act("FAKE_INSTALL") == "killed":
            os.kill(os.getppid(), signal.SIGKILL)
        if act("FAKE_INSTALL") == "interrupted":
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.killpg(0, signal.SIGINT)
        sys.exit(act("FAKE_INSTALL") is not None or (argv[-1] == "uv" and not act("FAKE_UV")))
elif argv[:2] == ["-m", "pytest"]:
    for arg in argv:
        if arg.startswith("--benchmark-json=") and act("FAKE_JSON") is not None:
            Path(arg.partition("=")[2]).write_text(os.environ["FAKE_JSON"])
    print(act("FAKE_PYTEST_SAYS", ""))
sys.exit(int(act("FAKE_STATUS_" + argv[:2][-1].rpartition("/")[2].partition(".")[0], "0")))
"""


class Sandbox:
    """A copy of the scripts that sees only stand-ins."""

    def __init__(self, place: Path) -> None:
        self.root = place / "the project"
        self.bin = place / "bin"
        self.calls_path = place / "calls"
        for path in (*SCRIPTS, *SOURCED):
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, self.root / path)
        for path in ("pyproject.toml", "cs336-basics/pyproject.toml"):
            (self.root / path).parent.mkdir(exist_ok=True)
            (self.root / path).write_text(f"# {path}\n")
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None, f"these tests need {tool}"
            (self.bin / tool).symlink_to(found)

    def add_python(self, name: str) -> Path:
        return self.add(name, f"#!{sys.executable} -S\n{FAKE_PYTHON}")

    def add(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, *command: str, **fakes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.bin / "bash", *command],
            env={"PATH": str(self.bin), "CALLS": str(self.calls_path), **fakes},
            cwd=self.root.parent,
            capture_output=True,
            text=True,
            start_new_session=True,  # an interruption in here stays in here
            timeout=60,
        )

    def setup(self, extra: str = "", **fakes: str) -> subprocess.CompletedProcess[str]:
        snippet = 'set -euo pipefail; . "$0"; setup_env "$1"; echo "PY=$PY"'
        return self.run("-c", snippet, str(self.root / SOURCED[0]), extra, **fakes)

    def calls(self) -> list[list[str]]:
        """Return the recorded calls since the last time, without probing ones."""
        if not self.calls_path.exists():
            return []
        recorded = [json.loads(line) for line in self.calls_path.read_text().splitlines()]
        self.calls_path.unlink()
        return [call for call in recorded if call[1] != "-c" and "config" not in call]

    def stamps(self) -> list[str]:
        return sorted(path.name for path in self.root.glob(".venv/.cs336*"))
