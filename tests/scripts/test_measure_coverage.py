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
    text = script.table({"totals": summary(300, 289, 30, 27), "files": files}, ["layers", "."], ["cli"])
    assert "96.3 % of the lines and 90.0 % of" in text
    assert "| lines.py | 94.0 | 100.0 | 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... |" in text
    assert "| branches.py | 100.0 | 80.0 |" in text
    assert "good.py" not in text
    assert "Not run, or failed, and so not counted: cli." in text
    assert script.shares(summary(0, 0)) == (100.0, 100.0)


def test_every_test_file_is_in_a_part(script: Any) -> None:
    tests = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    parts = script.parts()
    assert "." in parts
    assert {path.parts[0] for path in tests if len(path.parts) > 1} == set(parts) - {"."}


@pytest.fixture
def checkout(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("finetune_bn/a.py", "tests/layers/test_a.py", "tests/layers/test_b.py", "tests/test_top.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n", encoding="utf-8")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    return tmp_path


def test_a_folder_is_done_when_its_tests_passed_on_the_code_as_it_is_and_new_tests_are_added(
    script: Any, checkout: Path
) -> None:
    store = script.Store(checkout / "coverage.json", "python scripts/measure_coverage.py", device="cpu")
    every = script.test_files("layers")
    assert [path.name for path in every] == ["test_a.py", "test_b.py"]
    assert script.to_run(store, "layers") == (every, False)
    script.data_of("layers").write_text("", encoding="utf-8")
    store.add({"tests": "layers", "status": 1, **script.state("layers")})
    assert script.to_run(store, "layers") == (every, False)  # they failed
    store.add({"tests": "layers", "status": 0, **script.state("layers")})
    assert script.to_run(store, "layers") == ([], True)
    assert script.to_run(store, ".") == (script.test_files("."), False)
    new = checkout / "tests" / "layers" / "test_c.py"
    new.write_text("# new\n", encoding="utf-8")
    every[0].write_text("# changed\n", encoding="utf-8")
    assert script.to_run(store, "layers") == ([every[0], new], True)
    every[1].unlink()
    assert script.to_run(store, "layers") == ([every[0], new], False)  # what the third one ran is not to count
    store.add({"tests": "layers", "status": 0, **script.state("layers")})
    (checkout / "finetune_bn" / "a.py").write_text("# other lines\n", encoding="utf-8")
    assert script.to_run(store, "layers") == ([every[0], new], False)


def test_a_folder_whose_tests_fail_is_named_and_not_counted(
    script: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "results").mkdir()
    seen: list[list[str]] = []

    def run(part: str, tests: list[Path], add: bool) -> int:
        script.data_of(part).write_text("", encoding="utf-8")
        return int(part == "layers")

    def account(parts: list[str]) -> dict[str, Any]:
        seen.append(parts)
        return {"totals": summary(10, 10), "files": {}}

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(script, "account", account)
    monkeypatch.setattr(sys, "argv", ["measure_coverage.py", "--output", str(checkout / "results" / "coverage.json")])
    assert script.main() == 1
    assert seen == [["."]]
    assert "not counted, for their tests do not pass: layers" in capsys.readouterr().err
    assert "and so not counted: layers." in (checkout / "results" / "coverage.md").read_text(encoding="utf-8")
