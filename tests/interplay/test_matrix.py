"""Every cell of the interplay matrix is tried, and the page says what came of it."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_bn.errors import FinetuneBNError
from tests.interplay import loops, ranks
from tests.interplay.matrix import CALLBACKS, COLUMNS, SECTIONS, TABLE, Cell, Column, render
from tests.interplay.treatments import ROWS, Treatment

ALONE = [column for column in COLUMNS if column.run is not None]
IN_PAIRS = [(column.key, row.key) for column in COLUMNS if column.run is None for row in ROWS]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning.pytorch", "finetune_bn"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)


def parameters(columns: list[Column]) -> list[Any]:
    marks = [pytest.mark.slow]
    return [
        pytest.param(column, row, id=f"{column.key}-{row.key}", marks=marks if column.slow else [])
        for column in columns
        for row in ROWS
    ]


@pytest.mark.parametrize(("column", "row"), parameters(ALONE))
def test_a_treatment_keeps_its_promise_beside_something_else(column: Column, row: Treatment, tmp_path: Path) -> None:
    assert column.run is not None
    cell = column.cell(row.key)
    if cell.verdict == "refused":
        # What torch raises while it loads a state dict is no error of this package.
        with pytest.raises((FinetuneBNError, RuntimeError), match=re.escape(cell.says)):
            column.run(row, tmp_path)
        return
    ran = column.run(row, tmp_path)
    if cell.keeps:
        row.holds(ran)
    if cell.fact is not None:
        cell.fact(ran)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[dict[str, Any]]]:
    return ranks.run(IN_PAIRS, tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize(("column", "row"), parameters([column for column in COLUMNS if column.run is None]))
def test_a_treatment_keeps_its_promise_in_two_processes(column: Column, row: Treatment, pairs: Any) -> None:
    cell, found = column.cell(row.key), pairs[column.key, row.key]
    for of_rank in found:
        error = of_rank["error"]
        if cell.verdict == "refused":
            assert error is not None
            assert error[0] == "FinetuneBNError"
            assert cell.says in error[1]
            continue
        assert error is None
        assert of_rank["kept"] is None
    if cell.fact is not None and cell.verdict != "refused":
        cell.fact(found)


@pytest.mark.parametrize("row", [row for row in ROWS if row.key not in CALLBACKS], ids=lambda row: row.key)
def test_a_step_is_one_graph_for_the_compiler(row: Treatment, tmp_path: Path) -> None:
    """Without code being made of it, which is slow: `fullgraph` raises at the first break."""
    row.holds(loops.compile_eager(row, tmp_path))


def test_every_treatment_has_a_cell_in_every_column_and_no_cell_is_of_none() -> None:
    keys = [row.key for row in ROWS]
    assert len(set(keys)) == len(keys)
    assert len({column.key for column in COLUMNS}) == len(COLUMNS)
    for column in COLUMNS:
        assert set(column.cells) <= set(keys), column.key
        for cell in map(column.cell, keys):
            assert isinstance(cell, Cell)
            assert (cell.verdict == "works") == (not cell.text)
            assert (cell.verdict == "refused") == bool(cell.says)
            assert cell.keeps or cell.fact is not None
    assert {column.key for column in COLUMNS if column.run is None} == set(ranks.COLUMNS)


def test_the_table_of_the_page_is_the_matrix() -> None:
    assert TABLE.read_text(encoding="utf-8") == render() + "\n", "run: python -m tests.interplay.matrix"
    assert all(f"## {title}" in render() for title in SECTIONS)


def test_a_promise_that_is_broken_is_found(tmp_path: Path) -> None:
    """The assertions of this file can fail: a frozen layer whose statistics are written to is caught."""
    row = next(row for row in ROWS if row.key == "none")
    ran = loops.channels_last(row, tmp_path)
    row.holds(ran)
    with torch.no_grad():
        ran.net.backbone[1].running_mean += 1e-6
    with pytest.raises(AssertionError, match="what is constant moved"):
        row.holds(ran)
