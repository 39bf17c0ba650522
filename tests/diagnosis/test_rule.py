"""The rule of the advice: who has most of a say, what follows from it, and what it says of it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from finetune_bn.diagnosis.rule import ARMS, Measured, Setting, distance, recommend, shipped
from finetune_bn.errors import FinetuneBNError

SMALL = Measured("small", Setting(batch=4, images=100, shift=0.5, iid=True), {"live": 50.0, "none": 60.0}, 3)
LARGE = Measured("large", Setting(batch=64, images=1600, shift=0.5, iid=True), {"live": 75.0, "none": 60.0}, 3)


@pytest.mark.parametrize("row", [SMALL, LARGE])
def test_where_a_setting_was_measured_its_winner_is_advised(row: Measured) -> None:
    best = max(row.scores, key=lambda arm: row.scores[arm])
    assert recommend(row.setting, [SMALL, LARGE])[0].arm == best


def test_expected_loss_is_the_mean_weighted_by_nearness() -> None:
    asked = Setting(batch=8, images=100, iid=True)
    far = 3.0 + math.log(16, 4)  # three doublings of the batch, 16 times the images
    near, distant = math.exp(-1.0) + 1.0, math.exp(-far) + 1.0  # the say of all settings is spread over the two
    by_arm = {choice.arm: choice for choice in recommend(asked, [LARGE, SMALL])}
    assert by_arm["none"].expected_loss == pytest.approx(15.0 * distant / (near + distant))
    assert by_arm["live"].expected_loss == pytest.approx(10.0 * near / (near + distant))
    assert by_arm["live"].reasons[0].sentence.count("small")  # the nearest one is named first
    assert by_arm["live"].reasons[0].figure == 10.0


def test_the_learning_rate_is_a_weighted_geometric_mean_of_what_was_best_beside_live_layers() -> None:
    small = replace(SMALL, rates={"live": 1e-3, "none": 1e-4})
    large = replace(LARGE, rates={"live": 1e-3, "none": 4e-4})
    asked = Setting(batch=16, images=400, iid=True)  # two doublings and one fourfold from either
    found = {choice.arm: choice.lr_factor for choice in recommend(asked, [small, large])}
    assert found["none"] == pytest.approx(0.2)
    assert found["live"] == 1.0
    at_small = {choice.arm: choice.lr_factor for choice in recommend(small.setting, [small, large])}
    assert 0.1 < at_small["none"] < found["none"]
    unknown = {choice.arm: choice.lr_factor for choice in recommend(asked, [SMALL, LARGE])}
    assert unknown == {"none": 1.0, "live": 1.0}


def test_a_treatment_that_was_not_measured_is_not_ranked() -> None:
    assert {choice.arm for choice in recommend(SMALL.setting, [SMALL, LARGE])} == {"live", "none"}


def test_distance_is_symmetric_zero_to_itself_and_ignores_what_is_not_known() -> None:
    a, b = SMALL.setting, LARGE.setting
    assert distance(a, a) == 0.0
    assert distance(a, b) == distance(b, a) > 0.0
    assert distance(Setting(batch=4), a) == 0.0
    assert distance(Setting(batch=4, iid=False), a) > distance(Setting(batch=4, iid=True), a)


def test_the_shipped_settings_rank_and_every_score_is_a_percentage() -> None:
    for row in shipped():
        assert set(row.scores) == set(row.rates) <= set(ARMS)
        assert all(0.0 <= score <= 100.0 for score in row.scores.values())
        assert min(row.lost.values()) == 0.0
        ranked = recommend(row.setting)
        assert all(a.expected_loss <= b.expected_loss for a, b in pairwise(ranked))


@pytest.mark.parametrize(("setting", "rows"), [(SMALL.setting, []), (Setting(batch=0), [SMALL])])
def test_nothing_to_learn_from_or_no_batch_is_refused(setting: Setting, rows: list[Measured]) -> None:
    with pytest.raises(FinetuneBNError, match=r"measured|batch"):
        recommend(setting, rows)
