"""A program that kills training at random moments, and goes on with it until it is done.

Forked ranks begin to train in milliseconds, where fresh processes would spend seconds on imports.

    python training_kills.py FOLDER [NUM_KILLS [WORLD_SIZE [SEED]]]
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

# Of an optimizer's first step; here, each fork has it.
import torch._dynamo
import torch.distributed as dist
from checkpoint_ranks import same
from loop_runs import make_data, run, saved, weights

from cs336_systems.parallel import checkpoint
from cs336_systems.train.run_log import read_log
from cs336_systems.train.step import Stepper

CHANGES = {
    "training.num_steps": 60,
    "logging.interval": 5,
    "evaluation.interval": 30,
    # So often that half of the time one is being written.
    "checkpointing.checkpointing_interval": 2,
}
# Within this the ranks that were not killed must have ended too.
PROMPT_S = 20.0


class Kills:
    """Unbroken training, and training that is killed again and again, in one folder."""

    def __init__(self, folder: Path, world_size: int, seed: int) -> None:
        self.folder, self.world_size = folder, world_size
        self.random = random.Random(seed)
        self.data = str(make_data(folder))
        strategy = "none" if world_size == 1 else "zero1"
        self.changes = {**CHANGES, "training.ddp_wrapper": strategy}
        self.num_starts = self.num_runs = self.num_kills = 0
        self.kills_in_saves = 0
        children = self._start(folder / "unbroken")
        begin = time.monotonic()
        self._finish(children)
        self.duration_s = time.monotonic() - begin

    def kill(self, num_kills: int) -> None:
        """Kill so many times, and see what each run that was killed ends with."""
        while self.num_kills < num_kills:
            self.num_runs += 1
            self._one_run(self.folder / f"run{self.num_runs}", num_kills)

    def _one_run(self, out: Path, num_kills: int) -> None:
        """Train to the end, however often it takes."""
        while self.num_kills < num_kills:
            leftover = _unfinished(out)
            children = self._start(out)
            time.sleep(self.random.uniform(0, self.duration_s / 4))
            victim = self.random.choice(children)
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            if not any(self._ends(children)):
                return self._check(out)
            self.num_kills += 1
            self._note(out, in_save=bool(_unfinished(out) - leftover))
        self._finish(self._start(out))
        return self._check(out)

    def _note(self, out: Path, *, in_save: bool) -> None:
        self.kills_in_saves += in_save
        step = saved(out)[1] if checkpoint.exists(out / "checkpoints") else 0
        where = "while a checkpoint was written" if in_save else "between checkpoints"
        print(f"kill {self.num_kills}, {where}: step {step} is saved", flush=True)

    def _check(self, out: Path) -> None:
        unbroken = self.folder / "unbroken"
        assert same(weights(out), weights(unbroken)), out
        assert same(saved(out)[0], saved(unbroken)[0]), out
        got, wanted = (read_log(folder / "log.jsonl") for folder in (out, unbroken))
        for name in ("step", "loss", "validation_loss"):
            assert [line.get(name) for line in got] == [line.get(name) for line in wanted], out

    def _start(self, out: Path) -> list[int]:
        """Fork the ranks, and wait until each is in its first step or has ended."""
        self.num_starts += 1
        rendezvous = self.folder / f"rendezvous{self.num_starts}"
        began, begins = os.pipe()
        children = []
        for rank in range(self.world_size):
            if (child := os.fork()) == 0:
                os.close(began)
                self._train(out, rank, rendezvous, begins)
            children.append(child)
        os.close(begins)
        for _ in children:
            os.read(began, 1)
        os.close(began)
        return children

    def _train(self, out: Path, rank: int, rendezvous: Path, begins: int) -> None:
        real = Stepper.step

        def first_step(stepper: Stepper, *arguments: Any) -> Any:
            Stepper.step = real  # type: ignore[method-assign]
            os.write(begins, b"!")
            os.close(begins)
            return real(stepper, *arguments)

        Stepper.step = first_step  # type: ignore[method-assign]
        try:
            dist.init_process_group(
                "gloo",
                init_method=rendezvous.as_uri(),
                rank=rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=30),
            )
            run(self.data, str(out), self.changes)
        except BaseException as error:
            # Of a rank whose peer was killed; a run alone has no reason to fail.
            print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)

    def _ends(self, children: list[int]) -> list[int]:
        """Wait for all; return how each has ended."""
        begin = time.monotonic()
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert time.monotonic() - begin < PROMPT_S
        assert set(ends) <= {0, 1, -signal.SIGKILL}, ends
        assert self.world_size > 1 or 1 not in ends
        return ends

    def _finish(self, children: list[int]) -> None:
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert not any(ends), ends


def _unfinished(out: Path) -> set[str]:
    return {path.name for path in (out / "checkpoints").glob(".unfinished-*")}


def main(folder: str, num_kills: str = "20", world_size: str = "1", seed: str = "0") -> None:
    torch.set_num_threads(1)
    kills = Kills(Path(folder), int(world_size), int(seed))
    kills.kill(int(num_kills))
    print(
        f"{kills.num_kills} kills, {kills.kills_in_saves} of them while a checkpoint was written: "
        f"all {kills.num_runs} runs ended with the weights of an unbroken run"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
