"""The mutation check: which changes there are, and that a test which notices one kills it and another does not."""

from __future__ import annotations

import os
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
    for name in ("mutate", "store", "warm_tests"):
        sys.modules.pop(name, None)


def test_each_change_is_one_change_and_what_is_no_code_stays(script: Any) -> None:
    mutants = script.mutants_of("a.py", SOURCE)
    found = [script.mutated(SOURCE, mutant.number) for mutant in mutants]
    assert len(set(found)) == len(mutants)
    said = {mutant.change for mutant in mutants}
    assert said == {
        "constant: `0` -> `1`", "negation: `not x` -> `x`", "condition: `if not x:` -> `if not not x:`",
        "boolean: `x <= 3 and x + 1 != 7` -> `x <= 3 or x + 1 != 7`", "comparison: `x <= 3` -> `x < 3`",
        "constant: `3` -> `4`", "comparison: `x + 1 != 7` -> `x + 1 == 7`", "arithmetic: `x + 1` -> `x - 1`",
        "constant: `1` -> `2`", "constant: `7` -> `8`", "constant: `True` -> `False`",
    }  # fmt: skip
    assert all("assert x < 9" in source and "x: int" in source for source in found)


def test_the_sample_is_drawn_from_all_files_and_is_the_same_each_time(script: Any) -> None:
    drawn = script.sample(40, 0)
    assert drawn == script.sample(40, 0)
    assert drawn[:20] == script.sample(20, 0)
    assert len({mutant.file for mutant in drawn}) > 5
    assert all((SCRIPTS.parent / test).exists() for file in script.files() for test in script.tests_of(file))


def test_another_seed_draws_none_of_those_that_tests_were_written_for(script: Any) -> None:
    first, second, third = (set(script.sample(script.COUNT, seed)) for seed in range(3))
    assert len(first) == len(second) == len(third) == script.COUNT
    assert not first & second
    assert not third & (first | second)


def test_an_edit_of_the_code_leaves_the_other_mutants_of_the_sample_in_their_order(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "finetune_bn" / "a.py"
    path.parent.mkdir()
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "files", lambda: ["a.py"])
    path.write_text(SOURCE, encoding="utf-8")
    before = [script.key_of(mutant) for mutant in script.sample(99, 0)]
    path.write_text(SOURCE.replace("def f", "y = 2 if SOME else 5\n\n\ndef f"), encoding="utf-8")
    after = [script.key_of(mutant) for mutant in script.sample(99, 0)]
    assert len(after) > len(before)
    assert [key for key in after if key in before] == before
    assert before != [script.key_of(mutant) for mutant in script.mutants_of("a.py", SOURCE)]


@pytest.fixture(scope="module")
def warm(script: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    tmp_path = tmp_path_factory.mktemp("checkout")
    (tmp_path / "finetune_bn").mkdir()
    path = tmp_path / "finetune_bn" / "it.py"
    path.write_text(
        "def f(x):\n    while x > 9:\n        x = x - 1\n    return x + 1 if x > 0 else 0\n", encoding="utf-8"
    )
    test = (
        "import sys; sys.path.insert(0, '.')\nfrom finetune_bn.it import f\n\n\ndef test_f():\n    assert f(12) == 10\n"
    )
    (tmp_path / "test_it.py").write_text(test, encoding="utf-8")
    (tmp_path / "test_fails.py").write_text("def test_f():\n    assert False\n", encoding="utf-8")
    with script.WarmTests(tmp_path, imports=["pytest", "not_installed_here"]) as tests:
        yield tests


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_change_that_a_test_notices_is_killed_another_survives_and_one_that_never_ends_is_stopped(
    script: Any, warm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "tests_of", lambda _: ["test_it.py"])
    path = warm.checkout / "finetune_bn" / "it.py"
    source = path.read_text(encoding="utf-8")
    of = {mutant.change: mutant for mutant in script.mutants_of("it.py", source)}
    assert script.verdict(of["arithmetic: `x + 1` -> `x - 1`"], warm) == "killed"
    assert script.verdict(of["comparison: `x > 0` -> `x >= 0`"], warm) == "survived"
    monkeypatch.setattr(script, "TIMEOUT", 1)
    assert script.verdict(of["arithmetic: `x - 1` -> `x + 1`"], warm) == "timeout"
    assert path.read_text(encoding="utf-8") == source


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_test_file_that_fails_on_the_unchanged_code_stops_the_script_and_one_that_passes_is_run_once(
    script: Any, warm: Any, tmp_path: Path
) -> None:
    store = script.Store(tmp_path / "mutation.json", "python scripts/mutate.py", device="cpu")
    script.control(store, ["test_it.py"], warm)
    with pytest.raises(RuntimeError, match=r"test_fails\.py fails on the unchanged code"):
        script.control(store, ["test_it.py", "test_fails.py"], warm)
    assert [row["control"] for row in store.rows] == ["test_it.py"]


def test_the_table_gives_the_share_and_names_who_survived(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "file": "a.py",
            "line": 3,
            "change": "constant: `1` -> `2`",
            "nth": 0,
            "verdict": "killed",
            "at_first": "survived",
        },
        {"file": "a.py", "line": 4, "change": "boolean: `x or y` -> `x and y`", "nth": 0, "verdict": "survived"},
    ]
    monkeypatch.setitem(script.VERDICTS, ("a.py", "boolean: `x or y` -> `x and y`", 0), f"{script.SAME}: x is y")
    text = script.table(rows, 3)
    assert "1 of 2 mutants killed (50%)" in text
    assert "At first, before tests were written for its survivors, 0." in text
    assert "1 of the survivors change no result: without them 100%." in text
    assert "the first 2 of a sample of 3" in text
    assert "| a.py | 2 | 1 |" in text
    assert "| a.py:4 | boolean: `x or y` -> `x and y` | no result changes: x is y |" in text
