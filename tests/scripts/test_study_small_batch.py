"""The small-batch study: what it says of the range of learning rates follows from its rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import study_small_batch as study


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
    assert (found["best_frozen"], found["points"]) == ("original", 0)
    assert found["tolerated"] == {"none": [1e-4, 5e-4], "limited": [1e-4, 1e-3]}


@pytest.mark.parametrize("arm", ["limited", "none"])
def test_without_both_arms_nothing_is_said(arm: str) -> None:
    assert study.robustness([line(arm, 1, 2, 3, 2, 1)]) is None


def test_the_limited_arm_is_measured_at_batch_4_alone() -> None:
    assert "limited" in study.arms_at(4)
    assert not any("limited" in study.arms_at(batch) for batch in study.BATCHES if batch != 4)
