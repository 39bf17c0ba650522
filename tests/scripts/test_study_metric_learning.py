"""The metric learning study: which cells it measures, and that what it recommends follows from the table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
pytest.importorskip("lightning.pytorch")
import study_metric_learning as study
from store import Store

import finetune_bn as fbn


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results.json", "python study.py", study.SEEDS, device="cpu")


def fill(store: Store, score: Any, most: int = 1000) -> list[dict[str, Any]]:
    """Measure cell after cell, where `score(cell)` is Recall@1; return the cells in their order."""
    keys = []
    while len(keys) < most and (key := next(study.next_cells(store), None)):
        keys.append(key)
        row = {f"{part}_{name}": score(key) for part in ("val", "test") for name in ("recall_at_1", "map_at_r")}
        row |= {f"{name}/recalibrated": value - 1 for name, value in row.items() if key["arm"] == "live"}
        store.add(key | row)
    return keys


def frozen_is_best(key: dict[str, Any]) -> float:
    best = {"live": 1e-3, "untrained": 0.0}.get(key["arm"], 3e-4)
    base = {"live": 30.0, "untrained": 35.0, "none": 60.0, "merged": 60.5}.get(key["arm"], 50.0)
    return base - 10 * (key["lr"] != best) + key["seed"]


def test_each_arm_has_three_seeds_at_its_own_best_rate_and_no_cell_comes_twice(store: Store) -> None:
    keys = fill(store, frozen_is_best)
    assert len({tuple(key.values()) for key in keys}) == len(keys)
    for loss, k, arms in study.BLOCKS:
        for arm in arms:
            line = study.one_line(store, loss, k, arm)
            assert line is not None
            assert line["lr"] == (1e-3 if arm.startswith("live") else 3e-4)
            assert len(line["values"]) == 3
    assert not [key for key in keys if key["arm"] == "live_recalibrated"], "no training of its own"


def test_frozen_is_compared_with_live_seed_by_seed_and_the_text_says_so(store: Store) -> None:
    fill(store, frozen_is_best)
    text = study.markdown(study.summarize(store))
    assert "of frozen, affine none, against live, with 95 % intervals: NT-Xent, 16 x 2 +30.0 (+30.0 to +30.0);" in text
    assert "of frozen, affine none, steps limited, against frozen, affine none, with" in text
    assert "| NT-Xent, 16 x 2 | live, recalibrated after training | 0.001 | 30.0 ± 1.0 | -1.0 ± 0.0 |" in text
    assert "Not run to the end" not in text


def test_bold_is_the_best_of_a_row_and_what_is_within_one_spread_of_it(store: Store) -> None:
    fill(store, frozen_is_best)
    near = {(row["loss"], row["k"]): row["arms"] for row in study.summarize(store)["best_or_within_one_spread"]}
    assert near["ntxent", 2] == ["merged", "none"]
    assert near["ntxent", 4] == ["none"]


def test_a_study_that_was_cut_off_names_what_is_missing(store: Store, tmp_path: Path) -> None:
    fill(store, frozen_is_best, most=20)
    summary = study.summarize(store)
    text = study.markdown(summary)
    assert {line["k"] for line in summary["table"]} == {2}
    assert "Not run to the end yet: NT-Xent, 8 x 4;" in text
    study.plot(store, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_ghost_groups_are_as_many_as_images_of_a_label() -> None:
    assert study.ARMS["ghost"].policy == fbn.Ghost(2)
    assert study.title_of("proxy_anchor", 1) == "proxy anchor, i.i.d."
    assert study.title_of("ntxent", 8) == "NT-Xent, 4 x 8"
