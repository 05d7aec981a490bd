"""Do the Slurm templates start the program that they are given, with its arguments intact?"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from shell_sandbox import ROOT, Sandbox

TEMPLATES = ("scripts/slurm/train.sbatch", "scripts/slurm/train_multi_node.sbatch")
PROGRAM = ["-m", "a.program", "--name", "two words", '"$HOME"', "*", ""]
JOB = {
    "SLURM_JOB_ID": "31007",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "node[3-4]",
}


class SlurmSandbox(Sandbox):
    """A sandbox with srun, scontrol and a spool folder in which jobs' scripts lie."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        bash = f"#!{self.bin / 'bash'}"
        self.add("srun", f'{bash}\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n')
        self.add("scontrol", f'{bash}\n[[ "$*" == "show hostnames node[3-4]" ]]\necho node3\n')
        self.spool = place / "spool"
        self.spool.mkdir()

    def submit(
        self, template: str, *program: str, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        script = self.spool / "slurm_script"
        shutil.copy(ROOT / template, script)
        job = {**JOB, "SLURM_SUBMIT_DIR": str(self.root), **variables}
        return self.run(str(script), *program, **job)


@pytest.fixture
def sandbox(tmp_path: Path) -> SlurmSandbox:
    return SlurmSandbox(tmp_path)


@pytest.mark.parametrize("template", TEMPLATES)
def test_syntax(template: str) -> None:
    subprocess.run(["bash", "-n", ROOT / template], check=True)


@pytest.mark.parametrize(
    ("template", "num_nodes", "endpoint"),
    [(TEMPLATES[0], "1", "localhost:0"), (TEMPLATES[1], "2", "node3:16007")],
)
def test_program_is_run_by_torchrun(
    sandbox: SlurmSandbox, template: str, num_nodes: str, endpoint: str
) -> None:
    python = sandbox.add_python("given")
    done = sandbox.submit(template, *PROGRAM, CS336_PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    (call,) = sandbox.calls()
    assert call[1:] == [
        *("-m", "torch.distributed.run", f"--nnodes={num_nodes}", "--nproc-per-node=4"),
        *("--rdzv-backend=c10d", "--rdzv-id=31007", f"--rdzv-endpoint={endpoint}"),
        *PROGRAM,
    ]


@pytest.mark.parametrize("template", TEMPLATES)
def test_venv_of_the_submitting_folder_is_used(sandbox: SlurmSandbox, template: str) -> None:
    inside = sandbox.root / ".venv/bin/python"
    inside.parent.mkdir(parents=True)
    sandbox.add_python("python").rename(inside)
    done = sandbox.submit(template, "train.py")
    assert done.returncode == 0, done.stderr
    (call,) = sandbox.calls()
    assert (call[0], call[-1]) == ("python", "train.py")


@pytest.mark.parametrize("template", TEMPLATES)
def test_failure_of_the_program_is_that_of_the_job(sandbox: SlurmSandbox, template: str) -> None:
    python = sandbox.add_python("given")
    done = sandbox.submit(template, "x.py", CS336_PYTHON=str(python), FAKE_STATUS_torch="7")
    assert done.returncode == 7


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    ("program", "words"),
    [([], "name the program to run"), (["x.py"], "found no ")],
    ids=["no program", "no Python"],
)
def test_what_is_missing_is_said(
    sandbox: SlurmSandbox, template: str, program: list[str], words: str
) -> None:
    done = sandbox.submit(template, *program)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{Path(template).name}: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
