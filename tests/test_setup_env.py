"""Is the environment made once, from the right Python, and never taken for ready when it is not?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from shell_sandbox import Sandbox


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def editable(box: Sandbox, extra: str = "") -> list[str]:
    return ["--editable", f"{box.root}{extra}", "--editable", f"{box.root}/cs336-basics"]


def test_second_setup_installs_nothing(sandbox: Sandbox) -> None:
    sandbox.add_python("python3")
    first = sandbox.setup()
    assert first.returncode == 0, first.stderr
    python = f"{sandbox.root}/.venv/bin/python"
    assert first.stdout.endswith(f"setup: .venv is ready\nPY={python}\n")
    pip = ["python", "-m", "pip", "install"]
    assert sandbox.calls() == [
        ["python3", "-m", "venv", f"{sandbox.root}/.venv"],
        ["python", "-m", "pip", "--version"],
        [*pip, "--quiet", "uv"],
        [*pip, *editable(sandbox)],
    ]
    second = sandbox.setup()
    assert second.stdout == f"setup: .venv is up to date\nPY={python}\n"
    assert sandbox.calls() == []


@pytest.mark.parametrize("changed", ["pyproject.toml", "cs336-basics/pyproject.toml"])
def test_changed_dependencies_are_installed(sandbox: Sandbox, changed: str) -> None:
    sandbox.add_python("python3")
    sandbox.setup()
    sandbox.calls()
    (sandbox.root / changed).write_text("# changed\n")
    assert "up to date" not in sandbox.setup().stdout
    assert sandbox.calls()[-1][-4:] == editable(sandbox)
    assert "up to date" in sandbox.setup().stdout


def test_moved_project_is_installed_again(sandbox: Sandbox) -> None:
    sandbox.add_python("python3")
    sandbox.setup()
    sandbox.root = sandbox.root.rename(sandbox.root.with_name("moved"))
    sandbox.calls()
    sandbox.setup()
    assert sandbox.calls()[-1][-4:] == editable(sandbox)


def test_dev_set_serves_the_plain_one_and_not_the_reverse(sandbox: Sandbox) -> None:
    sandbox.add_python("python3")
    sandbox.setup()
    sandbox.calls()
    sandbox.setup("dev")
    assert sandbox.calls()[-1][-4:] == editable(sandbox, "[dev]")
    assert "up to date" in sandbox.setup().stdout
    assert "up to date" in sandbox.setup("dev").stdout


@pytest.mark.parametrize(("how", "status"), [("failed", 1), ("killed", -9), ("interrupted", 130)])
def test_broken_installation_leaves_no_stamp(sandbox: Sandbox, how: str, status: int) -> None:
    sandbox.add_python("python3")
    sandbox.setup()
    assert sandbox.stamps() == [".cs336-systems-installed"]
    (sandbox.root / "pyproject.toml").write_text("# changed\n")
    sandbox.calls()
    assert sandbox.setup(FAKE_INSTALL=how).returncode == status
    tried = len(sandbox.calls())
    assert sandbox.stamps() == []
    # Only a failure is worth a second try by other means.
    assert tried == (3 if how == "failed" else 2)
    assert "ready" in sandbox.setup().stdout
    assert sandbox.stamps() == [".cs336-systems-installed"]


def test_broken_environment_is_made_anew(sandbox: Sandbox) -> None:
    sandbox.add_python("python3")
    sandbox.setup()
    python = sandbox.root / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nonexistent/python3")
    sandbox.calls()
    assert sandbox.setup().returncode == 0
    assert sandbox.calls()[0][:3] == ["python3", "-m", "venv"]


def test_uv_from_pip_installs_with_the_settings_of_pip(sandbox: Sandbox) -> None:
    sandbox.add_python("python3")
    settings = "global.extra-index-url='\\na\\nb'\nglobal.find-links='/wheels'\nglobal.cert='c'"
    done = sandbox.setup(FAKE_UV="1", FAKE_PIP_CONFIG=f":env:.index-url='mine'\n{settings}")
    assert done.returncode == 0, done.stderr
    python = f"{sandbox.root}/.venv/bin/python"
    install = ["uv", "pip", "install", "--compile-bytecode", "--python", python]
    assert sandbox.calls()[-1] == [*install, *editable(sandbox)]
    seen = json.loads(Path(f"{sandbox.calls_path}.uv").read_text())
    assert seen["UV_DEFAULT_INDEX"] == "mine"
    assert seen["UV_INDEX"].split() == ["a", "b"]
    assert seen["UV_FIND_LINKS"] == "/wheels"


def test_uv_on_path_is_used_alone(sandbox: Sandbox) -> None:
    sandbox.add_python("uv")
    (sandbox.bin / "uv").rename(sandbox.bin / "recorder")
    # Only `venv` needs more than recording: it leaves an interpreter.
    place = f"{sandbox.root}/.venv/bin"
    sandbox.add(
        "uv",
        f'#!/bin/sh\n[ "$1" != venv ] || {{ mkdir -p "{place}"\n'
        f"{sys.executable} -c \"import shutil; shutil.copy('{sandbox.bin}/recorder', "
        f'\'{place}/python\')"; }}\nexec "{sandbox.bin}/recorder" "$@"\n',
    )
    first = sandbox.setup()
    assert first.returncode == 0, first.stderr
    venv, install = sandbox.calls()
    assert venv[1:] == ["venv", "--quiet", "--python", ">=3.11", f"{sandbox.root}/.venv"]
    assert install[1:3] == ["pip", "install"]
    assert install[-4:] == editable(sandbox)
    assert "up to date" in sandbox.setup().stdout
    assert sandbox.calls() == []


def one_line(done: subprocess.CompletedProcess[str], text: str) -> bool:
    """Say whether a script failed with exactly one line that holds `text`."""
    return done.returncode == 1 and done.stderr.count("\n") == 1 and text in done.stderr


EMPTY_SHIM = "#!/bin/sh\necho 'no such version' >&2\nexit 127\n"
NO_ENSUREPIP = "#!/bin/sh\ncase $2 in *ensurepip*) exit 1 ;; esac\nexit 0\n"


def test_no_python_is_one_clear_line(sandbox: Sandbox) -> None:
    assert one_line(sandbox.setup(), "setup: no Python >= 3.11 among python3.13 python3.12")
    sandbox.add("python3.12", EMPTY_SHIM)
    assert one_line(sandbox.setup(), "no Python >= 3.11")


def test_python_without_venv_is_one_clear_line(sandbox: Sandbox) -> None:
    sandbox.add("python3.11", NO_ENSUREPIP)
    assert one_line(sandbox.setup(), "setup: python3.11 has no venv or ensurepip")


def test_first_python_that_works_is_taken(sandbox: Sandbox) -> None:
    sandbox.add("python3.13", EMPTY_SHIM)
    sandbox.add("python3.12", NO_ENSUREPIP)
    sandbox.add_python("python3.11")
    sandbox.add_python("python3")
    assert "making .venv with python3.11" in sandbox.setup().stdout


def test_python_override(sandbox: Sandbox) -> None:
    sandbox.add_python("python3")
    sandbox.add_python("mine")
    assert one_line(sandbox.setup(PYTHON="nowhere"), "PYTHON must be a Python >= 3.11, got nowhere")
    assert "making .venv with mine" in sandbox.setup(PYTHON="mine").stdout


def test_given_python_is_used_as_it_is(sandbox: Sandbox) -> None:
    python = sandbox.add_python("given")
    done = sandbox.setup(CS336_PYTHON=str(python))
    assert done.stdout == f"setup: using {python} as it is\nPY={python}\n"
    assert sandbox.calls() == []
    assert not (sandbox.root / ".venv").exists()


def test_given_python_must_have_what_is_needed(sandbox: Sandbox) -> None:
    sandbox.add_python("given")
    assert one_line(sandbox.setup(CS336_PYTHON="given", FAKE_MISSING="torch"), "lacks: torch")
    assert one_line(sandbox.setup(CS336_PYTHON="nowhere"), "must be a Python, got nowhere")
    sandbox.add("old", EMPTY_SHIM)
    assert one_line(sandbox.setup(CS336_PYTHON="old"), "must be a Python >= 3.11, got old")


def test_this_interpreter_passes_the_check(sandbox: Sandbox) -> None:
    done = sandbox.setup(CS336_PYTHON=sys.executable)
    assert (done.returncode, done.stderr) == (0, "")
