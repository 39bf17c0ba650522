"""The script for a GPU, with tiny sizes on a CPU: it runs through, keeps each cell, and goes on where it was cut."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("timm")
pytest.importorskip("torchvision")

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MODULES = (
    "gpu_check",
    "gpu_cells",
    "bench_launches",
    "bench_step",
    "step_clock",
    "step_tables",
    "step_variants",
    "store",
)


@pytest.fixture(scope="module")
def check() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import gpu_check

        yield gpu_check
    for name in MODULES:
        sys.modules.pop(name, None)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def test_with_tiny_sizes_it_runs_through_on_a_cpu_and_a_second_run_measures_nothing_again(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_cells

    few = [gpu_cells.FLOOR, gpu_cells.LIVE, gpu_cells.ours("original", "auto"), "GroupNorm, 1 group"]
    monkeypatch.setattr(gpu_cells, "EAGER", few)
    monkeypatch.setattr(gpu_cells, "COMPILED", few[:1])
    monkeypatch.setattr(
        gpu_cells, "POLICIES", {name: gpu_cells.POLICIES[name] for name in list(gpu_cells.POLICIES)[:2]}
    )
    monkeypatch.setattr(gpu_cells, "MEMORIES_GIB", (8.0,))
    path = tmp_path / "gpu_check.json"
    names = [group.name for group in check.GROUPS if group.name != "tests"]
    arguments = ["--tiny", "--output", str(path), "--minutes", "100", "--groups", *names]
    assert check.main(arguments) == 0
    found = rows_of(path)
    assert {row["group"] for row in found} == set(names) - {"apex"}  # apex is for a GPU
    eager = [row for row in found if row["group"] == "eager"]
    assert [row["variant"] for row in eager[:4]] == [*few[1:], few[0]]
    assert all(row["ms"] > 0 and row["launches"] > 10 for row in eager)
    assert [row["off"] for row in found if row["group"] == "same as the CPU"] == [0, 0, 0]  # with itself
    without, limited = (row for row in found if row["group"] == "step limit")
    assert 0 < limited["launches"] - without["launches"] <= 40
    live, frozen = (row["computed"] for row in found if row["group"] == "largest batch")
    assert frozen > live > 0
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| GroupNorm, 1 group |" in text
    assert "No time was left" not in text
    capsys.readouterr()
    assert check.main(arguments) == 0
    assert len(rows_of(path)) == len(found)
    assert "eager" not in capsys.readouterr().out


@pytest.fixture
def cells(check: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Groups of made-up cells; what is put into the dict is raised by the cell of that name."""
    fails: dict[str, Any] = {"asked": []}

    def of(*names: str) -> Any:
        def measure(late: Any, name: str) -> list[dict[str, Any]]:
            fails["asked"].append(name)
            if name in fails:
                raise fails[name]
            return [{"ms": 1.5, "error": None}]

        return lambda sizes, device: (({"cell": n}, lambda late, n=n: measure(late, n)) for n in names)

    monkeypatch.setattr(check, "GROUPS", (check.Group("one", 10, of("a", "b")), check.Group("two", 10, of("c"))))
    return fails


def test_a_cell_that_fails_is_a_row_that_says_why_and_is_measured_again(
    check: Any, tmp_path: Path, cells: dict[str, Any]
) -> None:
    arguments = ["--tiny", "--output", str(tmp_path / "x.json")]
    cells["a"] = RuntimeError("no kernel image")
    assert check.main(arguments) == 1
    assert rows_of(tmp_path / "x.json")[0]["error"].startswith("RuntimeError: no kernel image (test_gpu_check.py, line")
    assert "no kernel image" in (tmp_path / "x.md").read_text(encoding="utf-8")
    del cells["a"]
    assert check.main(arguments) == 0
    assert cells["asked"] == ["a", "b", "c", "a"]


def test_a_cut_loses_nothing_and_what_there_was_no_time_for_is_named(
    check: Any, tmp_path: Path, cells: dict[str, Any]
) -> None:
    arguments = ["--tiny", "--output", str(tmp_path / "x.json")]
    cells["b"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        check.main(arguments)
    assert [row["cell"] for row in rows_of(tmp_path / "x.json")] == ["a"]
    assert check.main([*arguments, "--minutes", "0"]) == 0
    content = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert content["summary"]["left_out"] == ["one: cell b", "two: cell c"]
    assert "- one: cell b" in (tmp_path / "x.md").read_text(encoding="utf-8")


def test_without_a_gpu_it_says_so_and_how_it_runs_there(
    check: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check.torch.cuda, "is_available", lambda: False)
    assert check.main([]) == 1
    assert capsys.readouterr().err == (
        "gpu_check.py: there is no CUDA device here; --tiny runs it with tiny sizes on the CPU\n"
    )


def test_the_shares_of_the_time_stay_under_eight_minutes(check: Any) -> None:
    assert sum(group.seconds for group in check.GROUPS) <= 8 * 60
    assert check.arguments([]).minutes < 8


def test_every_file_with_a_gpu_test_is_found(check: Any) -> None:
    import gpu_cells

    found = {path.name for path in gpu_cells.gpu_files(SCRIPTS.parent / "tests")}
    assert {"test_batch.py", "test_classification.py", "test_recalibrate.py", "test_retrieval.py"} <= found
    assert "test_gpu_check.py" not in found


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "..\n8 passed, 300 deselected in 2.10s\n", (8, 0, 0, False)),
        (0, "ss\n1 skipped, 5 deselected in 2.10s\n", (0, 0, 1, False)),
        (1, "F.\nFAILED tests/x.py::test_y\n1 failed, 3 passed in 2.10s\n", (3, 1, 0, True)),
        (2, "ModuleNotFoundError: No module named 'jsonargparse'\n1 error in 1.0s\n", (0, 0, 0, True)),
        (5, "300 deselected in 2.10s\n", (0, 0, 0, True)),
    ],
)
def test_what_pytest_printed_is_a_row(check: Any, code: int, output: str, expected: tuple[int, int, int, bool]) -> None:
    import gpu_cells

    row = gpu_cells.outcome(code, output)
    assert (row["passed"], row["failed"], row["skipped"], row["error"] is not None) == expected
