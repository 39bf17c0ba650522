"""The table of peers' tests is of tests that exist, and each of those says where it comes from."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (Path(__file__).parent / "README.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and "::" in line
]
# General tests of ours that answer a peer's question as they are; the peer is named in the table alone.
GENERAL = {
    "tests/conversion/test_export.py",
    "tests/recalibration/test_settings.py",
    "tests/callbacks/test_conversion.py",
    "tests/peers/test_opacus.py",
    "tests/peers/test_finetuning_scheduler.py",
}


@cache
def functions(path: Path) -> dict[str, str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: ast.get_docstring(node) or "" for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_has_an_origin_its_tests_ours_and_a_state() -> None:
    assert len(ROWS) >= 60
    for row in ROWS:
        assert len(row) == 4, row
        assert row[3].split(":")[0] == "adapted", row


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}::{row[1]}")
def test_the_tests_of_a_row_exist_and_name_their_origin(row: list[str]) -> None:
    peer = row[0].split()[0]
    ours = re.findall(r"`(tests/\S+?\.py)::(\w+)`", row[2])
    assert ours, row
    for path, name in ours:
        known = functions(ROOT / path)
        assert name in known, f"{path} has no {name}"
        if path not in GENERAL:
            assert peer.lower() in known[name].lower(), f"{path}::{name} does not name {peer}"


def test_every_adapted_test_is_in_the_table() -> None:
    listed = {name for row in ROWS for name in re.findall(r"::(\w+)`", row[2])}
    for path in (ROOT / "tests" / "peers").glob("test_*.py"):
        for name, text in functions(path).items():
            if re.search(r"test\w*\.py::", text) and "mmdet" not in text:
                assert name in listed, f"{path.name}::{name} is of a peer's test, and in no row"
