#!/usr/bin/env bash
# Runs the tests and packs the submission; `--help` says how.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/setup_env.sh
. scripts/setup_env.sh
# shellcheck source=scripts/pytest_args.sh
. scripts/pytest_args.sh

usage() {
    cat <<'HELP'
usage: ./test_and_make_submission.sh [pytest arguments...]

Sets up Python, runs `pytest tests/` on two processes, and packs code, tests, benchmarks and reports.
Arguments go to pytest as they are; paths are relative to the project's folder.

  test_results.xml               the outcome of every test (JUnit)
  cs336-systems-submission.zip   what to hand in, checked after writing

A failing test makes the exit status non-zero. The zip is made all the same, with the failures in its
test_results.xml, because a late hand-in with a failure is better than none.

environment:
  CS336_PYTHON=PATH   run this interpreter, with what it has installed, and make no .venv
  PYTHON=PATH         make .venv with this interpreter (3.11 or newer)
  uv                  used when it is on PATH

examples:
  ./test_and_make_submission.sh
  ./test_and_make_submission.sh -n 0 -x                one process, stop at the first failure
  ./test_and_make_submission.sh -k "attention and not slow"

Packing alone: python scripts/make_submission.py --help
HELP
}

if asks_for_help "$@"; then
    usage
    exit 0
fi
# Tests that share a device or a process pool carry an xdist_group, which loadgroup keeps together.
if ! chooses_workers "$@"; then
    set -- -n 2 --dist loadgroup "$@"
fi
# pytest-benchmark warns, and so fails, on several processes unless it is told not to measure.
set -- --junitxml=test_results.xml --benchmark-disable "$@"
if ! names_target tests "$@"; then
    set -- tests/ "$@"
fi

setup_env
rm -f test_results.xml
status=0
"$PY" -m pytest "$@" || status=$?
packed=0
"$PY" scripts/make_submission.py || packed=$?
if [ "$status" -ne 0 ]; then
    echo "FAILED: pytest ended with status $status, see its output above." >&2
    [ "$packed" -ne 0 ] || echo "The submission was packed all the same, and its test_results.xml says so." >&2
    exit "$status"
fi
exit "$packed"
