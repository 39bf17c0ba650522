"""The studies of arms in settings: GroupNorm fine-tuned and batches of pairs, and the losses that they train with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import advice_arms
import arms
import compact
import study_group_norm_tuned as tuned
import study_pairs as pairs
from advice_pictures import Pictures
from compact import CHOOSE, Setting
from store import Store


def fill(plan: list[arms.Arm], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Measure all cells: frozen reaches 60 % at 1e-3 and at 3e-7 by proxies, others 5 less; seeds differ alike."""
    monkeypatch.setattr(arms, "missing", lambda setting: None)
    store = Store(folder / "x.json", "python x.py", (), device="cpu")
    while (key := next(arms.next_cells(plan, [], store), None)) and len(store.rows) < 2000:
        best = 3e-7 if "proxies" in key["setting"] else 1e-3
        ladder = next(arm.ladder for arm in plan if arm.setting.name == key["setting"])
        value = 60.0 - 5 * (key["arm"] != "none") - 3 * abs(ladder.index(key["lr"]) - ladder.index(best)) + key["seed"]
        row = {"val": value, "test": value}
        store.add(key | row | {f"{part}/recalibrated": value for part in row})
    return store.rows


def test_group_norm_is_compared_with_frozen_layers_at_every_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = fill(tuned.PLAN, tmp_path, monkeypatch)
    text = tuned.markdown(tuned.summarize(rows))
    assert text.count("\n") == 2 + len(tuned.PLAN) == 2 + 2 * 4 * 4
    assert "| lite0 | 1 | GroupNorm, eps own | 0.001 | 56.0 ± 1.0 | **-5.0 (-5.0 to -5.0)** | 3 |" in text
    assert {tuned.BY_NAME[name].batch for name in tuned.BY_NAME} == {1, 2, 4, 16}
    assert advice_arms.GROUP_NORM.keys() == tuned.TITLES.keys() - {"none"}


def test_proxies_find_a_rate_below_the_usual_ladder_and_rows_of_the_advice_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = fill(pairs.PLAN, tmp_path, monkeypatch)
    text = pairs.markdown(pairs.summarize(rows))
    proxies = "lite0 pk 32 of 400 same by proxies"
    assert f"| {proxies} | live, recalibrated | 3e-07 | 56.0 ± 1.0 | **+5.0 (+5.0 to +5.0)** | 3 |" in text
    assert "lite0 pk 32 of 400 same at 128 px" in text
    assert len([name for name in pairs.BY_NAME if name in advice_arms.BY_NAME]) == 2


def test_a_search_that_starts_from_another_setting_waits_for_its_rate() -> None:
    usual, longer = Setting("lite0", 4, 400, "same"), Setting("lite0", 4, 400, "same", length=9)
    arm = arms.Arm(longer, "none", after=usual)
    assert list(arm.wanted([])) == []
    rows = [
        {"setting": usual.name, "arm": "none", "lr": lr, "seed": CHOOSE, "val": 60.0 - 1e3 * lr}
        for lr in (1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
    ]
    assert [cell["lr"] for cell in arm.wanted(rows)] == [1e-5]
    assert arm.setting.name == "lite0 iid 4 of 400 same in 9 steps"


def images(labels: torch.Tensor) -> Pictures:
    none = torch.zeros(0)
    return Pictures(torch.rand(len(labels), 3, 64, 64), labels, none, none, none, none, classes=9)


def test_a_table_compares_arms_on_the_seeds_that_all_of_them_have(tmp_path: Path) -> None:
    setting = Setting("lite0", 4, 400, "same")
    plan = [arms.Arm(setting, name, (0, 1, 2, 3, 4)) for name in ("none", "limited", "affine")]
    rows = [
        {"setting": setting.name, "arm": name, "lr": lr, "seed": CHOOSE, "val": 60.0 - abs(lr - 1e-3), "test": 0.0}
        for name in ("none", "limited", "affine")
        for lr in (3e-4, 1e-3, 3e-3)
    ]
    # Seeds 3 and 4 are hard, and one of the arms has not seen them; the third arm has a single seed, and no line.
    for name, tests in (("none", (68.0, 69.0, 70.0, 60.0, 61.0)), ("limited", (67.0, 68.0, 69.0)), ("affine", (50.0,))):
        rows += [
            {"setting": setting.name, "arm": name, "lr": 1e-3, "seed": seed, "val": 0.0, "test": test}
            for seed, test in enumerate(tests)
        ]
    seeds = arms.common(rows, plan, setting)
    assert seeds == {0, 1, 2}
    lines = [arms.line(rows, arm, seeds) for arm in plan]
    assert [(line["test"], line["seeds"]) if line else None for line in lines] == [(69.0, 3), (68.0, 3), None]
    assert arms.line(rows, plan[0])["test"] == pytest.approx(65.6)


def test_a_cell_that_two_other_studies_have_is_taken_once(tmp_path: Path) -> None:
    cell = {"setting": "x", "arm": "none", "lr": 1e-3, "seed": 0}
    store = Store(tmp_path / "x.json", "python x.py", device="cpu")
    arms.adopt(store, [cell | {"test": 1.0}, cell | {"test": 1.0}, cell | {"seed": 1, "test": 2.0}])
    assert [row["seed"] for row in store.rows] == [0, 1]


def test_proxies_are_one_for_each_emoji_and_trained_beside_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytorch_metric_learning")
    data = images(torch.tensor([7, 7, 3, 3, 900, 900]))
    monkeypatch.setattr(compact, "pictures", lambda setting, seed: data)
    objective = compact.Objective(Setting("lite0", 4, 400, "same", "pk", proxies=True), seed=0)
    (group,) = objective.groups(1e-5)
    assert [p.shape for p in group["params"]] == [(3, compact.DIMENSION)]
    assert group["lr"] == pytest.approx(1e-3)
    near = objective.loss.proxies.detach()[[1, 1, 0, 0, 2, 2]]  # sorted: 3, 7, 900
    assert objective(near, data.labels) < objective(near.roll(2, 0), data.labels)
    assert compact.Objective(Setting("lite0", 4, 400, "same", "pk"), seed=0).groups(1e-5) == []


def test_images_drawn_one_by_one_are_classified_and_enlarged_ones_are_the_same_images() -> None:
    objective, outputs = compact.Objective(Setting("lite0", 4, 400, "same"), seed=0), torch.randn(4, 9)
    labels = torch.tensor([0, 1, 2, 8])
    assert objective(outputs, labels) == F.cross_entropy(outputs, labels)
    x = torch.rand(4, 3, 64, 64)
    large = Pictures(x, labels, x, labels, x, labels, classes=9).enlarged(128)
    for part in (large.train, large.val, large.test):
        assert part.shape == (4, 3, 128, 128)
        torch.testing.assert_close(part.mean(), x.mean(), rtol=0.01, atol=0)
