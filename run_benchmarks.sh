#!/usr/bin/env bash
# Measures what is under benchmarks/ and reports it; `--help` says how.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/setup_env.sh
. scripts/setup_env.sh
# shellcheck source=scripts/pytest_args.sh
. scripts/pytest_args.sh

usage() {
    cat <<'HELP'
usage: ./run_benchmarks.sh [pytest arguments...]

Sets up Python, runs `pytest benchmarks/`, and turns the measurements into tables, plots and one HTML
page. Arguments go to pytest as they are; paths are relative to the project's folder.

  out/benchmarks-<UTC time>.json   the measurements; --benchmark-json=PATH puts them elsewhere
  out/report/                      the report
  reports/                         the numbers kept with the project; this script leaves them alone

Rows measured before a failure are kept and reported; the exit status is then pytest's. After a kill,
<json>.journal.jsonl holds the rows measured so far, and this script says how to report them.

environment:
  CS336_PYTHON=PATH   run this interpreter, with what it has installed, and make no .venv
  PYTHON=PATH         make .venv with this interpreter (3.11 or newer)
  uv                  used when it is on PATH

examples:
  ./run_benchmarks.sh --smoke                          seconds, on any machine
  ./run_benchmarks.sh -k "attention and bf16"
  ./run_benchmarks.sh benchmarks/bench_attention.py --benchmark-json=out/attention.json

The options for choosing and sizing cases: pytest benchmarks/ --help
HELP
}

make_report() {
    "$PY" -m cs336_systems.report "$json" --out out/report || return
    echo
    echo "measurements:  $json"
    echo "report:        out/report/report.html; out/report/tables and out/report/plots beside it"
    echo "kept numbers:  reports/"
}

mention_journals() {
    local journal
    for journal in "$json.journal.jsonl" out/*.journal.jsonl; do
        if [ -s "$journal" ]; then
            echo "interrupted:   $journal holds the rows of a run that was cut short"
            echo "  report them: $PY -m cs336_systems.report $journal --out out/report-interrupted"
            echo "  go on there: ./run_benchmarks.sh --skip-done=$journal"
        fi
    done | awk '!seen[$0]++'
}

if asks_for_help "$@"; then
    usage
    exit 0
fi
json=$(option_value --benchmark-json "$@")
if [ -z "$json" ]; then
    json=out/benchmarks-$(date -u +%Y%m%dT%H%M%SZ).json
    set -- --benchmark-json="$json" "$@"
fi
set -- -p no:xdist "$@"
if ! names_target benchmarks "$@"; then
    set -- benchmarks/ "$@"
fi
mkdir -p out "$(dirname "$json")"

setup_env
begun=out/.begun
touch "$begun"
status=0
"$PY" -m pytest "$@" || status=$?
# An empty file, or one of an earlier run, holds nothing that was measured now.
if [ -s "$json" ] && [ "$json" -nt "$begun" ]; then
    make_report || { code=$?; [ "$status" -ne 0 ] || status=$code; }
else
    echo "no measurements were written to $json" >&2
fi
rm -f "$begun"
mention_journals
exit "$status"
