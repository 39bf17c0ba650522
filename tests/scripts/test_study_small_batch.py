"""The small-batch study: fair live arms, rates that are chosen by a seed that reports nothing, rows that are shared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import advice_arms
import arms
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


@pytest.fixture(scope="module")
def advice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows that the study of the advice has at batch 4, of two reporting seeds."""
    store = Store(tmp_path_factory.mktemp("advice") / "advice.json", "python study.py", (), device="cpu")
    for family in FAMILIES:
        setting = study.setting_of("usual", family, 4).name
        for arm, best in BEST_RATE.items():
            rung = LADDER.index(best)
            for lr in {3e-4, 1e-3, *LADDER[rung - 1 : rung + 2]}:
                for seed in (CHOOSE, 0, 1) if lr == best else (CHOOSE,):
                    key = {"setting": setting, "arm": arm, "lr": lr, "seed": seed}
                    store.add(key | figures(**key))
    return store.path


Measured = tuple[list[dict[str, Any]], list[Any]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, advice: Path) -> Measured:
    """The cells in the order in which they are asked for, and all rows."""
    store, order = Store(tmp_path_factory.mktemp("rows") / "x.json", "python study.py", (), device="cpu"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "missing", lambda setting: None)
        while keys := [key for _, key in zip(range(9), arms.next_cells(study.PLAN, [advice], store), strict=False)]:
            for key in keys:  # as workers take several at once
                if key not in order:
                    order.append(key)
                    store.add(key | figures(**key))
    return order, store.rows


def test_cells_of_the_study_of_the_advice_are_not_measured_again(measured: Measured, advice: Path) -> None:
    order, _ = measured
    names = [tuple(key.values()) for key in order]
    assert len(set(names)) == len(names) > 100
    there = {(r["setting"], r["arm"], r["lr"], r["seed"]) for r in arms.shared([advice], study.PLAN)}
    assert len(there) > 20
    assert not there & set(names)
    assert [key["seed"] for key in order[:3]] == [2, 3, 4]
    for batch in study.BATCHES:  # the cells are the same ones: name and steps
        mine = study.setting_of("usual", "lite0", batch)
        assert advice_arms.BY_NAME[mine.name] == mine


def test_the_seed_that_chooses_reports_nothing_and_every_rate_has_its_neighbors(measured: Measured) -> None:
    _, rows = measured
    for arm in study.PLAN:
        best = BEST_RATE["live" if arm.arm == "recalibrated" else arm.arm]
        assert arm.rate(rows) == best
        rung = LADDER.index(best)
        assert {LADDER[rung - 1], LADDER[rung + 1]} <= set(arms.tried(rows, arm.setting.name, arm.arm))
        assert tuple(arm.reached(rows)) == arm.seeds
        assert CHOOSE not in arm.seeds


def test_frozen_is_compared_with_the_live_arm_that_validation_prefers_seed_by_seed(measured: Measured) -> None:
    lines = {(x["family"], x["batch"], x["kind"]): x for x in study.margins(measured[1])}
    one = lines["lite0", 2, "best"]
    assert one["other"] == "live, recalibrated"
    # 60 + s against 45 + 1 + 0.9 s, s = 0 to 4: 14 + 0.1 s, sd 0.1581, t of 4 degrees of freedom 2.776
    assert one["points"] == pytest.approx(14.2)
    assert one["high"] - one["points"] == pytest.approx(2.776 * 0.158114 / 5**0.5, rel=1e-4)
    assert (one["seeds"], one["decided"]) == (5, True)
    assert not lines["lite0", 4, "best"]["decided"]  # less than 2.5 points
    assert ("lite0", 16, "same") not in lines  # 100 steps are its usual ones
    assert lines["lite0", 64, "same"]["seeds"] == 3


def test_the_tables_have_what_was_measured_and_say_what_is_undecided(measured: Measured, tmp_path: Path) -> None:
    study.write(measured[1], tmp_path / "x")
    text = (tmp_path / "x.md").read_text()
    assert "| lite0 | 2 | live, recalibrated | 47.8 | frozen | 62.0 | **+14.2 (+14.0 to +14.4)** | 5 |" in text
    assert "| lite0 | 4 | live, recalibrated | 61.8 | frozen | 62.0 | +0.2 (+0.0 to +0.4): undecided | 5 |" in text
    told = (tmp_path / "x_arms.md").read_text()
    assert "| mobilenetv2 | 4 | live, recalibrated, 4 times the epochs | 1600 | 0.001 | 66.8 ± 1.4 | 5 |" in told
    rates = (tmp_path / "x_rates.md").read_text().splitlines()
    assert rates[0] == "| network | batch | arm | at 3e-05 | at 0.0001 | at 0.0003 | at 0.001 | at 0.003 |"
    assert "| lite0 | 4 | frozen, steps limited |  | 56.0 | 60.0 | 56.0 |  |" in rates
    assert len(rates) == 2 + 2 * 4 * 4
    assert (tmp_path / "x.png").stat().st_size > 0


def test_rows_of_another_study_are_taken_once_and_never_in_place_of_own_ones(tmp_path: Path, advice: Path) -> None:
    there = arms.shared([advice, tmp_path / "not there.json"], study.PLAN)
    assert {row["arm"] for row in arms.shared([advice], study.PLAN[:2])} == {"none", "live"}
    own = Store(tmp_path / "x.json", "python study.py", (), device="cpu")
    own.add(there[0] | {"test": -1.0, "commit": "a"})
    arms.adopt(own, there)
    arms.adopt(own, there)
    assert len(own.rows) == len(there)
    assert own.rows[0]["test"] == -1.0
    assert arms.commits(own.rows) == {"a": 1, "before": len(there) - 1}
