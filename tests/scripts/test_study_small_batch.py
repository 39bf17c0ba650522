"""The small-batch study: what it says of the range of learning rates follows from its rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import study_small_batch as study
from store import Store


def line(arm: str, *accuracy: float) -> dict[str, Any]:
    return {"arm": arm, "accuracy": {f"{lr:g}": a for lr, a in zip(study.RANGE_RUNGS, accuracy, strict=True)}}


def test_a_rate_is_tolerated_while_all_up_to_the_best_are_within_the_points() -> None:
    lines = [
        line("live", 40, 50, 60, 70, 75),  # not a frozen arm
        line("none", 66, 68, 65, 30, 67),
        line("original", 60, 69, 65, 20, 20),
        line("limited", 66, 67, 69, 68, 64),
    ]
    found = study.robustness(lines)
    assert found is not None
    assert found["tolerated"] == {"none": [1e-4, 5e-4], "limited": [1e-4, 1e-3]}


@pytest.mark.parametrize("arm", ["limited", "none"])
def test_without_both_arms_nothing_is_said(arm: str) -> None:
    assert study.robustness([line(arm, 1, 2, 3, 2, 1)]) is None


def test_the_limited_arm_is_measured_at_batch_4_alone() -> None:
    assert "limited" in study.arms_at(4)
    assert not any("limited" in study.arms_at(batch) for batch in study.BATCHES if batch != 4)


def test_frozen_is_compared_with_live_seed_by_seed_by_the_arm_that_was_fixed_in_advance(tmp_path: Path) -> None:
    store = Store(tmp_path / "x.json", "python study.py", study.SEEDS, device="cpu")
    test = {"live": (50.0, 60.0, 70.0), "none": (61.0, 70.0, 79.0), "merged": (90.0, 90.0, 90.0)}
    for arm, accuracies in test.items():
        for seed, accuracy in enumerate(accuracies):
            for lr in study.FIRST_RUNGS if seed == 0 else (5e-4,):
                row = study.cell(arm, 2, lr, seed) | {"val_accuracy": float(lr == 5e-4), "test_accuracy": accuracy}
                store.add(row)
    margin = study.against_live(store, 2)
    assert margin is not None
    assert (margin["arm"], margin["seeds"], margin["points_above_live"]) == ("none", 3, 10)  # 11, 10 and 9
    half = 4.303 * 1 / 3**0.5
    assert margin["interval"] == pytest.approx([10 - half, 10 + half])
    assert study.against_live(store, 4) is None
