"""The result of a comparison: who is best, what is said of those that failed, and the forms it is stored in."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from finetune_bn.comparison.result import Comparison, Run

LOSS = ((10, 2.0),)


def run(arm: str, lr: float, steps: int, score: float | None, seed: int = 0, **others: object) -> Run:
    return Run(arm, lr, seed, steps, ((steps, score),), LOSS, score, 1.0, **others)  # type: ignore[arg-type]


def comparison(*runs: Run, seeds: tuple[int, ...] = (0,)) -> Comparison:
    arms = dict.fromkeys([run.arm for run in runs], "in words")
    return Comparison("Plain", "accuracy", arms, runs, seeds, (30, 90), (360, 40))


def test_who_got_to_the_end_comes_before_who_was_dropped_whatever_the_scores() -> None:
    found = comparison(run("dropped", 1e-3, 30, 0.9, dropped_at=30), run("a", 1e-3, 90, 0.7), run("b", 1e-3, 90, 0.8))
    assert [row.arm for row in found.table] == ["b", "a", "dropped"]
    assert found.best is not None
    assert (found.best.arm, found.best.lr, found.best.score) == ("b", 1e-3, 0.8)
    assert found.table[2].dropped_at == 30


def test_an_arms_rate_is_the_best_of_its_longest_trainings_and_the_smaller_of_two_equal_ones() -> None:
    found = comparison(
        run("a", 1e-4, 90, 0.7), run("a", 1e-3, 90, 0.7), run("a", 1e-2, 30, 0.9, dropped_at=30), run("b", 1, 90, 0.1)
    )
    assert found.table[0].lr == 1e-4


def test_the_score_is_the_mean_over_seeds_and_a_rate_of_which_a_seed_failed_is_passed_over() -> None:
    failed = run("a", 1e-2, 90, None, 1, failed="the loss was nan at step 4")
    runs = [run("a", 1e-3, 90, 0.6), run("a", 1e-3, 90, 0.8, 1), run("a", 1e-2, 90, 0.9), failed]
    (row,) = comparison(*runs, seeds=(0, 1)).table
    assert (row.lr, row.score, row.seeds) == (1e-3, 0.7, 2)
    assert row.sd is not None
    assert abs(row.sd - 0.2 / 2**0.5) < 1e-12


def test_failed_arms_are_named_in_the_table_with_the_reason() -> None:
    found = comparison(run("a", 1e-3, 90, 0.7), run("b", 1e-2, 30, None, failed="the loss was nan at step 4"))
    assert "failed: the loss was nan at step 4" in str(found)
    assert found.table[1].score is None
    alone = comparison(run("b", 1e-2, 30, None, failed="the loss was nan at step 4"))
    assert alone.best is None
    assert "none of 1 treatments could be trained" in str(alone)
    assert alone.plot().get_axes()


def test_json_csv_and_figure_hold_all_runs(tmp_path: Path) -> None:
    found = comparison(run("a", 1e-3, 90, 0.7), run("b", 1e-2, 30, None, failed="why, with a comma"))
    found.save(tmp_path / "new")
    data = json.loads((tmp_path / "new" / "comparison.json").read_text())
    assert data["best"] == "a"
    assert [r["failed"] for r in data["runs"]] == [None, "why, with a comma"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "new" / "comparison.csv").read_text())))
    assert [row["failed"] for row in rows] == ["", "why, with a comma"]
    (axes,) = found.plot().get_axes()
    assert [line.get_label() for line in axes.get_lines() if not str(line.get_label()).startswith("_")] == ["a"]
    assert "<table" in found._repr_html_()
    assert "Comparison on" in (tmp_path / "new" / "comparison.html").read_text(encoding="utf-8")
