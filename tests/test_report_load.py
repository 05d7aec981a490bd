"""Loading: what the tidy frame holds, and that whatever cannot be used is refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import report_fixtures as fx
from hypothesis import given
from hypothesis import strategies as st

from cs336_systems.errors import UsageError
from cs336_systems.measure.record import Case, Record
from cs336_systems.report.frame import case_id, load

PLAIN = {
    "size": "small",
    "context": 256,
    "precision": "fp32",
    "compile": "eager",
    "pass": "forward",
}
FAST = {**PLAIN, "precision": "bf16", "compile": "blocks"}


def one(tmp_path: Path, *entries: dict[str, Any], **device: Any) -> dict[str, Any]:
    """Return the row that a file of some entries gives for its first."""
    path = fx.write(tmp_path / "run.json", fx.document(*entries, **device))
    return load([path]).rows()[0]


def test_fixture_records_have_the_shape_of_the_real_ones() -> None:
    real = Record(case=Case(study="s", params={"a": 1}), device="cuda").to_json()
    assert set(fx.record("s", {"a": 1})) == set(real)
    assert fx.record("s", {"a": 1})["schema"] == real["schema"]


def test_times_are_milliseconds_and_quantiles_come_from_the_rounds(tmp_path: Path) -> None:
    entry = fx.timed("s", {"n": 1}, 0.02)
    entry["stats"]["data"] = [0.010, 0.020, 0.030, 0.040, 0.050, 0.060]
    row = one(tmp_path, entry)
    assert row["median_ms"] == pytest.approx(20)
    assert (row["q20_ms"], row["q80_ms"]) == (pytest.approx(20), pytest.approx(50))
    assert row["data_ms"] == pytest.approx([10, 20, 30, 40, 50, 60])


def test_quantiles_without_rounds_are_the_quartiles(tmp_path: Path) -> None:
    entry = fx.timed("s", {"n": 1}, 0.02)
    del entry["stats"]["data"]
    entry["stats"] |= {"q1": 0.019, "q3": 0.021}
    row = one(tmp_path, entry)
    assert (row["q20_ms"], row["q80_ms"]) == (pytest.approx(19), pytest.approx(21))
    assert row["data_ms"] is None


def test_rates_follow_from_the_median(tmp_path: Path) -> None:
    more = {"tokens": 1000, "flops": 9.89e12, "flops_dtype": "bf16"}
    row = one(tmp_path, fx.timed("s", {"n": 1}, 0.02, metrics={"peak_bytes": 3 * 2**30}, **more))
    assert row["tokens_per_s"] == pytest.approx(50_000)
    assert row["tflops"] == pytest.approx(494.5)
    assert row["share_of_peak"] == pytest.approx(50)
    assert row["peak_gib"] == pytest.approx(3)


def test_share_of_an_unknown_peak_is_unknown(tmp_path: Path) -> None:
    entry = fx.timed("s", {"n": 1}, 0.02, flops=1e12, flops_dtype="bf16")
    assert one(tmp_path, entry, device=fx.CPU)["share_of_peak"] is None
    entry["extra_info"]["flops_dtype"] = "fp8"
    assert one(tmp_path, entry)["share_of_peak"] is None


def test_host_cases_of_a_gpu_machine_are_the_hosts(tmp_path: Path) -> None:
    data = fx.document(fx.timed("s", {"n": 1}, 0.02, flops=1e12, flops_dtype="bf16"))
    data["benchmarks"][0]["extra_info"]["device"] = "cpu"
    row = load([fx.write(tmp_path / "run.json", data)]).rows()[0]
    assert (row["device_name"], row["device_kind"]) == ("Example CPU 9000", "cpu")
    assert row["share_of_peak"] is None
    assert row["power_limit_w"] is None


def test_speedup_is_against_the_row_the_baseline_names(tmp_path: Path) -> None:
    base = {"precision": "fp32", "compile": "eager"}
    entries = [fx.timed("model_pass", FAST, 0.005, baseline=base)]
    entries.append(fx.timed("model_pass", PLAIN, 0.02, baseline=base))
    entries.append(fx.timed("model_pass", {**FAST, "size": "xl"}, 0.02, baseline=base))
    rows = load([fx.write(tmp_path / "run.json", fx.document(*entries))]).rows()
    assert [row["speedup"] for row in rows] == [pytest.approx(4), pytest.approx(1), None]
    assert rows[0]["baseline"] == "precision=fp32, compile=eager"


def test_no_speedup_against_a_row_without_a_time(tmp_path: Path) -> None:
    base = {"precision": "fp32", "compile": "eager"}
    stopped = fx.untimed("model_pass", PLAIN, "oom", reason="asked for 2 GiB")
    row = one(tmp_path, fx.timed("model_pass", FAST, 0.005, baseline=base), stopped)
    assert row["speedup"] is None


def test_parameters_keep_their_types_beside_other_studies(tmp_path: Path) -> None:
    entries = [fx.timed("a", {"context": 256}, 0.01), fx.timed("b", {"flag": True}, 0.01)]
    rows = load([fx.write(tmp_path / "run.json", fx.document(*entries))]).rows()
    assert rows[0]["context"] == 256
    assert isinstance(rows[0]["context"], int)
    assert rows[1]["context"] is None
    assert rows[1]["flag"] is True


def test_parameter_named_like_a_column_gets_one_of_its_own(tmp_path: Path) -> None:
    row = one(tmp_path, fx.timed("s", {"clock": "odd", "status": 3}, 0.01))
    assert (row["clock"], row["case.clock"]) == ("wall_ms", "odd")
    assert (row["status"], row["case.status"]) == ("ok", 3)


def test_counts_stay_exact(tmp_path: Path) -> None:
    large = 2**60 + 1
    rows = one(tmp_path, fx.timed("s", {"n": 1}, 0.01, counts={"bytes": large}))
    assert rows["counts.bytes"] == large


def test_later_file_replaces_the_same_case_on_the_same_hardware_only(tmp_path: Path) -> None:
    early = fx.write(tmp_path / "a.json", fx.document(fx.timed("s", {"n": 1, "m": 2}, 0.01)))
    late = fx.write(tmp_path / "b.json", fx.document(fx.timed("s", {"m": 2, "n": 1}, 0.03)))
    other = fx.document(fx.timed("s", {"n": 1, "m": 2}, 0.05), device=fx.CPU)
    frame = load([early, late, fx.write(tmp_path / "c.json", other)])
    assert [row["median_ms"] for row in frame.rows()] == pytest.approx([30, 50])
    assert frame.warnings == (f"report: {late}: 1 case measured again replace those of {early}",)


def test_journal_gives_the_same_rows_as_the_whole_file(tmp_path: Path) -> None:
    data = fx.document(*fx.findings())
    whole = load([fx.write(tmp_path / "run.json", data)])
    journal = load([fx.write_journal(tmp_path / "run.journal.jsonl", data)])
    hidden = ("file", "source")
    strip = [{k: v for k, v in row.items() if k not in hidden} for row in whole.rows()]
    assert [{k: v for k, v in row.items() if k not in hidden} for row in journal.rows()] == strip
    assert journal.warnings == ()


def test_truncated_last_line_of_a_journal_is_left_out_with_a_warning(tmp_path: Path) -> None:
    data = fx.document(fx.timed("s", {"n": 1}, 0.01))
    path = fx.write_journal(tmp_path / "run.jsonl", data, '{"benchmark": {"fulln')
    frame = load([path])
    assert len(frame.cases) == 1
    assert frame.warnings == (f"report: {path}: line 3 is cut off and left out",)


def test_metric_that_is_not_a_number_is_left_out_with_a_warning(tmp_path: Path) -> None:
    entry = fx.timed("s", {"n": 1}, 0.01, metrics={"error": float("nan"), "other": float("inf")})
    path = fx.write(tmp_path / "run.json", fx.document(entry))
    frame = load([path])
    key = "benchmarks[0].extra_info.metrics.error"
    assert frame.warnings == (f"report: {path}: {key} is not a number and left out",)
    assert frame.rows()[0]["metrics.other"] == float("inf")


def _set(data: Any, key: str, value: Any) -> None:
    *steps, last = key.split(".")
    for step in steps:
        data = data[int(step) if step.isdigit() else step]
    data[last] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "stats.median",
            float("nan"),
            "benchmarks[0].stats.median must be a positive number, got nan",
        ),
        ("stats.mean", -1.0, "benchmarks[0].stats.mean must be a positive number, got -1.0"),
        ("stats.min", 0, "benchmarks[0].stats.min must be a positive number, got 0"),
        ("stats.max", float("inf"), "benchmarks[0].stats.max must be a positive number, got inf"),
        ("stats.q1", True, "benchmarks[0].stats.q1 must be a positive number, got True"),
        ("stats.stddev", -1, "benchmarks[0].stats.stddev must be a number of at least 0, got -1"),
        ("stats", {}, "benchmarks[0].stats.mean must be a positive number, got nothing"),
        (
            "stats.data",
            [1.0, "x"],
            "benchmarks[0].stats.data[1] must be a positive number, got 'x'",
        ),
        ("extra_info.case", None, "benchmarks[0].extra_info.case must be an object, got None"),
        (
            "extra_info.case",
            {"n": []},
            "extra_info.case.n must be a string, a number or true/false",
        ),
        (
            "extra_info.status",
            "oom",
            "benchmarks[0].extra_info.status must be one of ok, got 'oom'",
        ),
        ("extra_info.clock", "sun", "extra_info.clock must be one of wall_ms, gpu_ms, got 'sun'"),
        ("extra_info.study", "../up", "extra_info.study must be made of letters"),
        (
            "extra_info.counts",
            {"n": 1.5},
            "extra_info.counts.n must be a whole number of 64 bits, got 1.5",
        ),
        ("extra_info", {}, "extra_info.schema must be one of cs336-systems/1, got nothing"),
        ("extra_info.schema", "cs336-systems/9", "schema must be one of cs336-systems/1, got"),
    ],
)
def test_wrong_entry_is_refused_by_file_and_key(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    data = fx.document(fx.timed("s", {"n": 1}, 0.01))
    _set(data, f"benchmarks.0.{key}", value)
    path = fx.write(tmp_path / "run.json", data)
    with pytest.raises(UsageError) as caught:
        load([path])
    assert str(caught.value).startswith(f"report: {path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold JSON, got an empty file"),
        ("  \n", "must hold JSON, got an empty file"),
        ("hello", "must hold JSON, got Expecting value at line 1 column 1"),
        ('{"machine_info": {"a"', "must hold JSON, got a file that is cut off"),
        ('{"machine_info": "abc', "must hold JSON, got a file that is cut off"),
        ("[1, 2]", "must be pytest-benchmark JSON, got JSON of another shape"),
        ('{"a": 1}', "must be pytest-benchmark JSON, got JSON of another shape"),
        ('{"machine_info": {}, "benchmarks": []}', "got pytest-benchmark JSON of another suite"),
        ("[" * 100_000, "must hold JSON, got"),
    ],
)
def test_file_that_is_no_result_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load([path])
    assert str(caught.value).startswith(f"report: {path}: ")
    assert message in str(caught.value)


def test_missing_binary_and_caseless_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.json: cannot be read: No such file or directory"):
        load([tmp_path / "none.json"])
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="bytes that are not UTF-8"):
        load([tmp_path / "bytes.json"])
    with pytest.raises(UsageError, match="must hold at least one case, got 0"):
        load([fx.write(tmp_path / "zero.json", fx.document())])


def test_other_schema_of_the_file_is_refused(tmp_path: Path) -> None:
    data = fx.document(fx.timed("s", {"n": 1}, 0.01))
    data["cs336_systems"]["schema"] = "cs336-systems/2"
    rule = r"cs336_systems.schema must be one of cs336-systems/1, got 'cs336-systems/2'"
    with pytest.raises(UsageError, match=rule):
        load([fx.write(tmp_path / "run.json", data)])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"machine_info', "line 1 must hold JSON"),
        ('HEAD\n{"benchmark": {"x"\n{"row": {}}\n', "line 2 must hold JSON"),
        ('HEAD\n{"neither": 1}\n', "line 2 must hold a benchmark or a row"),
        ("HEAD\n", "must hold at least one case, got 0"),
        ('HEAD\n{"row": {}}\n', "line 2: row.schema must be one of"),
    ],
)
def test_broken_journal_is_refused_by_line(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(lines.replace("HEAD", json.dumps(fx.document())))
    with pytest.raises(UsageError, match=message):
        load([path])


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers() | st.booleans(), min_size=1))
def test_case_id_ignores_the_order_of_parameters(params: dict[str, Any]) -> None:
    assert case_id("s", params) == case_id("s", dict(reversed(params.items())))


def test_report_imports_neither_torch_nor_triton() -> None:
    code = (
        "import sys, cs336_systems.report.__main__;"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'triton')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
