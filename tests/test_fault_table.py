"""Is every test that the table of faults names a test that is collected?"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "faults.md"
ROW = re.compile(r"\| [^|]+ \| `(tests/test_\w+\.py)::(test_\w+)` \| [^|]+ \| [^|]+ \|")


def test_every_row_names_a_test_that_is_collected() -> None:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    rows = [line for line in rows if not line.startswith(("| fault |", "| --- |"))]
    assert len(rows) > 40
    tests: dict[str, set[str]] = {}
    for row in rows:
        match = ROW.fullmatch(row)
        assert match is not None, row
        file, name = match.groups()
        if file not in tests:
            tests[file] = _top_level_functions(ROOT / file)
        assert name in tests[file], row


def _top_level_functions(path: Path) -> set[str]:
    """Return what pytest collects from a file of plain functions, without importing it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
