"""The mutation check: which changes there are, and that a test which notices one kills it and another does not."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SOURCE = """
def f(x: int = 0) -> bool:
    assert x < 9
    if not x:
        return x <= 3 and x + 1 != 7
    return True
"""


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import mutate

        yield mutate
    for name in ("mutate", "store"):
        sys.modules.pop(name, None)


def test_each_change_is_one_change_and_what_is_no_code_stays(script: Any) -> None:
    number = sum(1 for _ in script.candidates(ast.parse(SOURCE)))
    found = [script.mutated(SOURCE, i) for i in range(number)]
    assert len({source for source, _, _ in found}) == number
    said = {change for _, change, _ in found}
    assert said == {
        "constant: `0` -> `1`", "negation: `not x` -> `x`", "condition: `if not x:` -> `if not not x:`",
        "boolean: `x <= 3 and x + 1 != 7` -> `x <= 3 or x + 1 != 7`", "comparison: `x <= 3` -> `x < 3`",
        "constant: `3` -> `4`", "comparison: `x + 1 != 7` -> `x + 1 == 7`", "arithmetic: `x + 1` -> `x - 1`",
        "constant: `1` -> `2`", "constant: `7` -> `8`", "constant: `True` -> `False`",
    }  # fmt: skip
    assert all("assert x < 9" in source and "x: int" in source for source, _, _ in found)


def test_the_sample_is_drawn_from_all_files_and_is_the_same_each_time(script: Any) -> None:
    drawn = script.sample(40, 0)
    assert drawn == script.sample(40, 0)
    assert drawn[:20] == script.sample(20, 0)
    assert len({mutant.file for mutant in drawn}) > 5
    assert all((SCRIPTS.parent / test).exists() for file in script.files() for test in script.tests_of(file))


def test_a_change_that_a_test_notices_is_killed_and_another_survives(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "finetune_bn").mkdir()
    path = tmp_path / "finetune_bn" / "it.py"
    path.write_text("def f(x):\n    return x + 1 if x > 0 else 0\n", encoding="utf-8")
    test = (
        "import sys; sys.path.insert(0, '.')\nfrom finetune_bn.it import f\n\n\ndef test_f():\n    assert f(2) == 3\n"
    )
    (tmp_path / "test_it.py").write_text(test, encoding="utf-8")
    monkeypatch.setattr(script, "tests_of", lambda _: ["test_it.py"])
    source = path.read_text(encoding="utf-8")
    numbers = range(sum(1 for _ in script.candidates(ast.parse(source))))
    changes = {script.mutated(source, number)[1]: number for number in numbers}
    for change, verdict in (("constant: `1` -> `2`", "killed"), ("comparison: `x > 0` -> `x >= 0`", "survived")):
        assert script.verdict(script.Mutant("it.py", changes[change], 1, change), tmp_path) == verdict
    assert path.read_text(encoding="utf-8") == source


def test_the_table_gives_the_share_and_names_who_survived(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"file": "a.py", "line": 3, "change": "constant: `1` -> `2`", "verdict": "killed"},
        {"file": "a.py", "line": 4, "change": "boolean: `x or y` -> `x and y`", "verdict": "survived"},
    ]
    monkeypatch.setitem(script.VERDICTS, ("a.py", "boolean: `x or y` -> `x and y`"), "equivalent: x is y")
    text = script.table(rows)
    assert "1 of 2 mutants killed (50%)" in text
    assert "| a.py:4 | boolean: `x or y` -> `x and y` | equivalent: x is y |" in text
