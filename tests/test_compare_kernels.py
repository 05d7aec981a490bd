"""Kernels of several checkouts side by side: who takes turns with whom, and who is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compare_kernels
import pytest
import torch
from compare_kernels import Candidate, CompareError, flops, main, parse_shape

ROOT = Path(__file__).parents[1]
SHAPE = "B1 H2 S256 D64 causal"

# Answers like the worker, in no time, and as its tile says: `hang` never, `wrong` with an error.
STAND_IN = """
import json, sys, time
for line in sys.stdin:
    question = json.loads(line)
    tile = question.get("tile", {{}})
    if tile.get("hang"):
        time.sleep(60)
    if tile.get("ends"):
        sys.exit(3)
    with open({log!r}, "a") as log:
        print(question["do"], question.get("which", question.get("apart")), file=log)
    if tile.get("wrong"):
        print(json.dumps({{"error": "AssertionError: dq errs"}}), flush=True)
    else:
        print("noise of a library", flush=True)
        print(json.dumps({{"timed": [2.0, 1700.0, 690.0]}}), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    log = tmp_path / "log"
    worker = tmp_path / "worker.py"
    worker.write_text(STAND_IN.format(log=str(log)))
    monkeypatch.setattr(compare_kernels, "_WORKER", worker)
    monkeypatch.setattr(compare_kernels, "_CHECK_SECONDS", 5.0)
    return log


def test_candidates_and_their_tiles() -> None:
    found = Candidate.parse(f"new={ROOT}:hold=False,q_stages=2")
    assert (found.name, found.path) == ("new", ROOT)
    assert found.tile == {"hold": False, "q_stages": 2}
    assert Candidate.parse(f"new={ROOT}").tile == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("new", "candidate must be NAME=PATH[:field=value,...], got 'new'"),
        ("new=/nowhere", "candidate new: path must be a checkout, got '/nowhere'"),
        (f"new={ROOT}:hold=maybe", "candidate new: hold must be a number, True or False"),
    ],
)
def test_what_is_no_candidate_is_named(text: str, said: str) -> None:
    with pytest.raises(CompareError) as error:
        Candidate.parse(text)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    "arguments",
    [["a"], [f"a={ROOT}", f"a={ROOT}"], [f"a={ROOT}", "--shapes", "B1 H1 S128 D96 causal"]],
)
def test_a_users_fault_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("compare_kernels: ")
    assert said.count("\n") == 1


def test_flops_count_the_causal_half_and_backward_twice_and_a_half() -> None:
    full, causal = parse_shape("B2 H3 S128 D64 full"), parse_shape("B2 H3 S128 D64 causal")
    assert flops(full, "forward") == 4 * 2 * 3 * 128**2 * 64
    assert flops(causal, "backward") == flops(full, "forward") / 2 * 2.5


@pytest.mark.parametrize("apart", [False, True])
def test_all_take_turns_and_every_one_is_kept(
    apart: bool, stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = [f"a={ROOT}", f"b={ROOT}:hold=False", "--shapes", SHAPE, "--rounds", "2"]
    arguments += ["--apart"] if apart else []
    assert main([*arguments, "--json", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    assert [row["pass"] for row in found["rows"]] == ["forward", "backward"]
    assert found["rows"][0]["runs"] == {
        "a": [[2.0, 1700.0, 690.0]] * 2,
        "b": [[2.0, 1700.0, 690.0]] * 2,
    }
    asked = stand_in.read_text().split("\n")
    assert asked.count(f"time {apart}") == 8
    assert sum(line.startswith("check") for line in asked) == 4
    rate = flops(parse_shape(SHAPE), "forward") / 2.0 / 1e9
    assert f"a {rate:.0f} TFLOP/s (1700 MHz, 690 W)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("wrong=True", "AssertionError: dq errs"),
        ("hang=True", "no answer within 5 s"),
        ("ends=True", "its process ended"),
    ],
)
@pytest.mark.usefixtures("stand_in")
def test_who_fails_is_left_out_and_the_others_go_on(
    fault: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"a={ROOT}", f"b={ROOT}:{fault}", "--shapes", SHAPE, "--rounds", "1"]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert f"b: left out: {said}" in printed
    assert f"{SHAPE}, backward: a " in printed
    assert "; b" not in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"a={ROOT}", "--shapes", SHAPE, "--passes", "forward"]) == 1
    said = "a: left out: RuntimeError: needs a GPU of compute capability 9.0, found none"
    assert said in capsys.readouterr().out
