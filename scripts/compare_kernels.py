"""Time the Hopper kernels of several checkouts, or with several tiles, side by side on one GPU.

    python3 scripts/compare_kernels.py base=../base head=. head_held=.:hold=True \\
        --shapes "B1 H16 S16384 D64 causal" "B8 H16 S2048 D64 full" --json out/kernels.json

A candidate is a checkout's path and, behind a colon, fields of its tile that are to have another
value. Each has a process of its own, in which its results are first held to fp64 and to themselves;
one that raises, hangs or moves is left out with a line that says so. Then all take turns, forwards
and backwards, in bursts long enough to meet the power limit, and the clock and the power of each
burst are written down: at that limit a faster kernel gets a lower clock. With --apart calls are
timed one at a time, behind a flush of L2 and a pause, as the benchmarks do: bursts tell candidates
apart that differ by 3 %, calls apart those that differ by 1 % (0.3 % in forward passes).

The backward pass includes what goes before its kernel (D, a buffer of zeros) and after it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from cs336_systems.accounting import attention_flops

_WORKER = Path(__file__).with_name("compare_kernels_worker.py")
_SHAPE = re.compile(r"B(\d+) H(\d+) S(\d+) D(64|128) (causal|full)")
_PASSES = ("forward", "backward")
_CHECK_SECONDS = 180.0
_BUILD_SECONDS = 120.0
_TIME_SECONDS = 60.0


class CompareError(Exception):
    """What the user gave that cannot be used, in one line."""


@dataclass(frozen=True)
class Candidate:
    """One version of the kernels."""

    name: str
    path: Path
    tile: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Return NAME=PATH or NAME=PATH:field=value,... as a candidate.

        Raises: CompareError.
        """
        name, _, rest = text.partition("=")
        place, _, fields = rest.partition(":")
        path = Path(place)
        if not name or not place:
            raise CompareError(f"candidate must be NAME=PATH[:field=value,...], got {text!r}")
        if not (path / "cs336_systems" / "attention").is_dir():
            raise CompareError(f"candidate {name}: path must be a checkout, got {place!r}")
        tile = {}
        for pair in filter(None, fields.split(",")):
            key, _, value = pair.partition("=")
            try:
                tile[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                raise CompareError(
                    f"candidate {name}: {key} must be a number, True or False, got {value!r}"
                ) from None
        return cls(name, path, tile)


def parse_shape(text: str) -> dict[str, Any]:
    """Return a shape's name as the worker takes it.

    Raises: CompareError.
    """
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise CompareError(f"--shapes must be like 'B1 H16 S16384 D64 causal', got {text!r}")
    return {"size": [int(found[at]) for at in range(1, 5)], "causal": found[5] == "causal"}


def flops(shape: dict[str, Any], which: str) -> float:
    """Return the FLOPs that a pass is credited with."""
    batch, heads, seq, head_dim = shape["size"]
    return attention_flops(batch, heads, seq, head_dim, which, is_causal=shape["causal"])


class Worker:
    """A candidate's process, asked one thing at a time."""

    def __init__(self, candidate: Candidate) -> None:
        root = candidate.path.resolve()
        paths = f"{root}{os.pathsep}{root / 'cs336-basics'}"
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self._answers.put(json.loads(line))
        self._answers.put({"error": "its process ended"})

    def ask(self, limit_s: float, **question: Any) -> dict[str, Any]:
        """Return the answer, or {"error": ...}, after which the process is gone."""
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._answers.get(timeout=limit_s)
        except queue.Empty:
            answer = {"error": f"no answer within {limit_s:g} s"}
        except BrokenPipeError:
            answer = {"error": "its process ended"}
        if "error" in answer:
            self.close()
        return answer

    def close(self) -> None:
        """End the process, whatever its kernels do."""
        self._process.kill()
        self._reader.join()
        with contextlib.suppress(BrokenPipeError):  # what it was still to be asked
            self._process.communicate()


def compare(
    candidates: Sequence[Candidate],
    shapes: Sequence[str],
    passes: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    apart: bool,
) -> dict[str, Any]:
    """Check and time all candidates, printing as it goes; return what was found."""
    workers = {candidate.name: Worker(candidate) for candidate in candidates}
    found: dict[str, Any] = {"checks": {}, "rows": []}
    parsed = {name: parse_shape(name) for name in shapes}
    wanted = sorted({(which, shape["size"][3]) for shape in parsed.values() for which in passes})
    try:
        for which, head_dim in wanted:
            question = {"do": "check", "which": which, "head_dim": head_dim}
            _ask_all(candidates, workers, found["checks"], _CHECK_SECONDS, question)
        for name, shape in parsed.items():
            for which in passes:
                question = {"do": "build", "which": which, **shape}
                _ask_all(candidates, workers, {}, _BUILD_SECONDS, question)
                runs = _take_turns(list(workers), workers, rounds, seconds, apart)
                found["rows"].append({"shape": name, "pass": which, "runs": runs})
                print(_line(name, which, shape, runs), flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    return found


def _ask_all(
    candidates: Sequence[Candidate],
    workers: dict[str, Worker],
    answers: dict[str, Any],
    limit_s: float,
    question: dict[str, Any],
) -> None:
    """Ask all at the same time, since most of it is compiling; leave out those that fail."""
    asked = [candidate for candidate in candidates if candidate.name in workers]
    with ThreadPoolExecutor(max(len(asked), 1)) as pool:
        given = pool.map(lambda c: workers[c.name].ask(limit_s, tile=c.tile, **question), asked)
        for candidate, answer in zip(asked, given, strict=True):
            answers.setdefault(candidate.name, []).append({**question, **answer})
            if "error" in answer:
                print(f"{candidate.name}: left out: {answer['error']}", flush=True)
                del workers[candidate.name]


def _take_turns(
    names: list[str], workers: dict[str, Worker], rounds: int, seconds: float, apart: bool
) -> dict[str, list[Any]]:
    runs: dict[str, list[Any]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            if name in workers:
                question = {"do": "time", "seconds": seconds, "apart": apart}
                answer = workers[name].ask(_TIME_SECONDS, **question)
                if "error" in answer:
                    print(f"{name}: left out: {answer['error']}", flush=True)
                    del workers[name]
                else:
                    runs[name].append(answer["timed"])
    return runs


def _line(name: str, which: str, shape: dict[str, Any], runs: dict[str, list[Any]]) -> str:
    parts = []
    for candidate, turns in runs.items():
        if turns:
            ms, mhz, watts = (median(turn[at] for turn in turns) for at in range(3))
            rate = flops(shape, which) / ms / 1e9
            parts.append(f"{candidate} {rate:.0f} TFLOP/s ({mhz:.0f} MHz, {watts:.0f} W)")
    return f"{name}, {which}: {'; '.join(parts) or 'nothing left'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, 1 if a candidate was left out, or 2 for what cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("candidates", nargs="+", metavar="NAME=PATH[:field=value,...]")
    parser.add_argument("--shapes", nargs="+", default=["B1 H16 S16384 D64 causal"])
    parser.add_argument("--passes", nargs="+", choices=_PASSES, default=list(_PASSES))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn")
    parser.add_argument("--apart", action="store_true", help="time calls one at a time")
    parser.add_argument("--json", type=Path, help="write all turns there: median ms, MHz, W")
    options = parser.parse_args(argv)
    try:
        candidates = [Candidate.parse(text) for text in options.candidates]
        if len({candidate.name for candidate in candidates}) < len(candidates):
            raise CompareError("candidates must have names of their own, got one twice")
        for shape in options.shapes:
            parse_shape(shape)
    except CompareError as error:
        print(f"compare_kernels: {error}", file=sys.stderr)
        return 2
    found = compare(
        candidates,
        options.shapes,
        options.passes,
        rounds=options.rounds,
        seconds=options.seconds,
        apart=options.apart,
    )
    if options.json is not None:
        options.json.write_text(json.dumps(found))
    whole = options.rounds * len(candidates)
    return 0 if all(sum(map(len, row["runs"].values())) == whole for row in found["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
