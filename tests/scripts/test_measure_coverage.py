"""The account of coverage: shares from counts, and the files that fall short of what they should reach."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("coverage")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import measure_coverage

    yield measure_coverage
    for name in ("measure_coverage", "store"):
        sys.modules.pop(name, None)


def summary(lines: int, covered: int, branches: int = 0, taken: int = 0) -> dict[str, int]:
    counts = {"num_statements": lines, "covered_lines": covered}
    return counts | {"num_branches": branches, "covered_branches": taken}


def test_files_below_what_they_should_reach_are_listed_with_the_lines_that_are_missing(script: Any) -> None:
    files = {
        "good.py": {"summary": summary(100, 95, 10, 9), "missing_lines": [1]},
        "lines.py": {"summary": summary(100, 94, 10, 10), "missing_lines": list(range(20))},
        "branches.py": {"summary": summary(100, 100, 10, 8), "missing_lines": []},
    }
    text = script.table({"totals": summary(300, 289, 30, 27), "files": files}, ["layers", "."])
    assert "96.3 % of the lines and 90.0 % of" in text
    assert "| lines.py | 94.0 | 100.0 | 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... |" in text
    assert "| branches.py | 100.0 | 80.0 |" in text
    assert "good.py" not in text
    assert script.shares(summary(0, 0)) == (100.0, 100.0)


def test_every_test_file_is_in_a_part(script: Any) -> None:
    tests = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    parts = script.parts()
    assert "." in parts
    assert {path.parts[0] for path in tests if len(path.parts) > 1} == set(parts) - {"."}
