"""The small-batch study: fair live arms, rates that are chosen by a seed that reports nothing, rows that are shared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import study_advice
import study_small_batch as study
from compact import CHOOSE, FAMILIES, LADDER
from store import Store

BEST_RATE = {"live": 1e-3, "none": 1e-4, "limited": 3e-4}


def figures(setting: str, arm: str, lr: float, seed: int) -> dict[str, float]:
    """What a training is made to reach: frozen 60 %, live less at small batches, recalibrated 2 more on validation."""
    rungs = abs(LADDER.index(lr) - LADDER.index(BEST_RATE[arm]))
    behind = {"live": 15.0 if " 2 of" in setting else 1.0}.get(arm, 0.0) - 5.0 * ("steps" in setting)
    score = 60.0 - behind - 4.0 * rungs + (seed % 5) * (1 if arm == "none" else 0.9)
    found = {"val": score, "test": score}
    return found | ({"val/recalibrated": score + 2, "test/recalibrated": score + 1} if arm == "live" else {})


@pytest.fixture
def advice(tmp_path: Path) -> Path:
    """The rows that the study of the advice has at batch 4, of two reporting seeds."""
    store = Store(tmp_path / "advice.json", "python study.py", (), device="cpu")
    for family in FAMILIES:
        setting = study.setting_of("usual", family, 4).name
        for arm, best in BEST_RATE.items():
            rung = LADDER.index(best)
            for lr in {3e-4, 1e-3, *LADDER[rung - 1 : rung + 2]}:
                for seed in (CHOOSE, 0, 1) if lr == best else (CHOOSE,):
                    key = {"setting": setting, "arm": arm, "lr": lr, "seed": seed}
                    store.add(key | figures(**key))
    return store.path


@pytest.fixture
def measured(tmp_path: Path, advice: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, Any]], list[Any]]:
    """The cells in the order in which they are asked for, and all rows."""
    monkeypatch.setattr(study, "missing", lambda setting: None)
    store, order = Store(tmp_path / "x.json", "python study.py", (), device="cpu"), []
    while (key := next(study.next_cells(advice, study.BATCHES, store), None)) and len(order) < 2000:
        order.append(key)
        store.add(key | figures(**key))
    return order, [*store.rows, *study.shared(advice)]


def test_cells_of_the_study_of_the_advice_are_not_measured_again(
    measured: tuple[list[dict[str, Any]], list[Any]], advice: Path
) -> None:
    order, _ = measured
    names = [tuple(key.values()) for key in order]
    assert len(set(names)) == len(names) > 100
    there = {(r["setting"], r["arm"], r["lr"], r["seed"]) for r in study.shared(advice)}
    assert not there & set(names)
    assert [key["seed"] for key in order[:3]] == [2, 3, 4]
    for batch in study.BATCHES:  # the cells are the same ones: name and steps
        mine = study.setting_of("usual", "lite0", batch)
        assert study_advice.BY_NAME[mine.name] == mine


def test_the_seed_that_chooses_reports_nothing_and_every_rate_has_its_neighbors(
    measured: tuple[list[dict[str, Any]], list[Any]],
) -> None:
    _, rows = measured
    for length, batches, arms, seeds in study.PLAN:
        for family in FAMILIES:
            for batch in batches:
                for arm in arms:
                    setting = study.setting_of(length, family, batch)
                    best = BEST_RATE["live" if arm == "recalibrated" else arm]
                    assert study.chosen_rate(rows, setting, arm) == best
                    rung = LADDER.index(best)
                    assert {LADDER[rung - 1], LADDER[rung + 1]} <= set(study.tried(rows, setting, arm))
                    assert set(seeds) <= set(study.reached(rows, length, family, batch, arm)) <= set(study.SEEDS)


def test_frozen_is_compared_with_the_live_arm_that_validation_prefers_seed_by_seed(
    measured: tuple[list[dict[str, Any]], list[Any]],
) -> None:
    _, rows = measured
    lines = {(x["family"], x["batch"], x["arm"], x["other"]): x for x in study.margins(rows)}
    one = lines["lite0", 2, ("usual", "none"), ("usual", "recalibrated")]
    # 60 + s against 45 + 1 + 0.9 s, s = 0 to 4: 14 + 0.1 s, sd 0.1581, t of 4 degrees of freedom 2.776
    assert one["points"] == pytest.approx(14.2)
    assert one["high"] - one["points"] == pytest.approx(2.776 * 0.158114 / 5**0.5, rel=1e-4)
    assert (one["seeds"], one["decided"]) == (5, True)
    assert not lines["lite0", 4, ("usual", "none"), ("usual", "recalibrated")]["decided"]  # less than 2.5 points
    assert ("lite0", 16, ("same", "none"), ("same", "recalibrated")) not in lines  # 100 steps are its usual ones
    assert lines["lite0", 64, ("same", "none"), ("same", "recalibrated")]["seeds"] == 3
    assert ("lite0", 2, ("usual", "none"), ("usual", "live")) not in lines


def test_the_tables_have_what_was_measured_and_say_what_is_undecided(
    measured: tuple[list[dict[str, Any]], list[Any]], tmp_path: Path
) -> None:
    summary = study.summarize(measured[1])
    text = study.margin_table(summary)
    assert "| lite0 | 2 | live, recalibrated | 47.8 | frozen | 62.0 | **+14.2 (+14.0 to +14.4)** | 5 |" in text
    assert "| lite0 | 4 | live, recalibrated | 61.8 | frozen | 62.0 | +0.2 (+0.0 to +0.4): undecided | 5 |" in text
    arms = study.arms_table(summary)
    assert "| mobilenetv2 | 4 | live, recalibrated, 4 times the epochs | 1600 | 0.001 | 65.9 ± 0.9 | 3 |" in arms
    study.plot(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
