"""Whatever is wrong with a file, it is loaded and drawn or refused in one line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import report_fixtures as fx
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cs336_systems.errors import UsageError
from cs336_systems.report.compare import compare
from cs336_systems.report.frame import load
from cs336_systems.report.publish import publish


def _paths(data: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [prefix] if prefix else []
    steps: Any = enumerate(data) if isinstance(data, list) else ()
    for step, value in data.items() if isinstance(data, dict) else steps:
        found += _paths(value, (*prefix, step))
    return found


_SOUND = fx.document(
    fx.timed("s", {"n": 1}, 0.01, metrics={"m": 1.0}, counts={"c": 1}, facts={"f": "x"}),
    fx.untimed("s", {"n": 2}, "oom", reason="asked for 1 GiB"),
)
_JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.just([[]]),
    st.just({"x": {}}),
    st.just(10**400),
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
@given(path=st.sampled_from(_paths(_SOUND)), junk=_JUNK)
@example(path=("benchmarks", 0, "stats", "median"), junk=10**400)
@example(path=("machine_info", "device", "peak_flops"), junk=[])
@example(path=("machine_info", "device", "name"), junk="\x1f")
@example(path=("benchmarks", 0, "extra_info", "case", "n"), junk=10**400)
@example(path=("benchmarks", 0, "extra_info", "conditions"), junk=[[]])
@example(path=("cs336_systems", "run"), junk="x")
@example(path=("commit_info",), junk=3)
def test_any_spoiled_file_loads_or_is_refused_in_one_line(
    tmp_path: Path, path: tuple[Any, ...], junk: Any
) -> None:
    data = copy.deepcopy(_SOUND)
    holder: Any = data
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = junk
    file = fx.write(tmp_path / "run.json", data)
    try:
        frame, refused = load([file]), ""
    except UsageError as error:
        frame, refused = None, str(error)
    if frame is None:
        assert refused.startswith(f"report: {file}: ")
        assert "\n" not in refused
    else:
        # What was let in must be fit for everything that is made of it.
        publish(frame, tmp_path / "out", "Fuzz")
        assert compare(frame, frame).passed
