"""A bar is drawn where it is asked for, or where there is a terminal; else nothing is."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest

from finetune_bn.errors import MissingDependency
from finetune_bn.utilities.progress import progress_bar


@pytest.fixture
def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("rich"):
            raise ImportError("No module named 'rich'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def draw(show: bool | None, total: int | None = 4) -> None:
    with progress_bar("Counting", "sheep", total, show) as report:
        report(1, "the first")
        report(3, "the last but one")


def test_it_shows_what_is_done_in_its_unit_with_the_note(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    draw(True)
    out, err = capsys.readouterr()
    assert out == ""
    for word in ("Counting", "3 sheep", "the last but one"):
        assert word in err


def test_a_total_that_is_not_known_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    draw(True, total=None)
    assert "3 sheep" in capsys.readouterr().err


@pytest.mark.parametrize("show", [False, None])
def test_nothing_is_drawn_without_a_terminal_unless_asked_for(
    show: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(show)
    assert capsys.readouterr() == ("", "")


def test_without_rich_a_bar_that_was_asked_for_is_an_error_and_one_that_was_not_is_left_out(
    without_rich: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MissingDependency, match="pip install rich"):
        draw(True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    draw(None)
    assert capsys.readouterr() == ("", "")


def test_the_error_of_what_it_shows_passes_through() -> None:
    with pytest.raises(ZeroDivisionError), progress_bar("Counting", "sheep", 4, True) as report:
        report(1 // 0, "")
