"""The GroupNorm study: which cells it measures, and that its tables tell what was measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
pytest.importorskip("lightning.pytorch")
import study_group_norm as study
import study_group_norm_report as report
from store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results.json", "python study.py", study.SEEDS, device="cpu")


def near(key: dict[str, Any]) -> dict[str, Any]:
    """Return figures of a cell that was not fine-tuned; those of one conversion differ by seed."""
    agreement = {"sequential": 70.0, "closed_form": 25.0}.get(key.get("init", ""), 0.0) + key["seed"]
    row = {"agreement": agreement, "cosine": 0.9, "recall": 60.0, "recall_batch_norm": 61.0, "seconds": 7.0}
    if key["part"] == "zero_shot":
        row["layers"] = 49
    return row | ({"passes": 4.0} if key.get("init") == "sequential" else {})


def fill(store: Store, *parts: str) -> list[dict[str, Any]]:
    """Measure cell after cell; return them in their order."""
    keys = []
    while len(keys) < 1000 and (key := next(study.next_cells(parts, store), None)):
        keys.append(key)
        store.add(key | near(key))
    return keys


def test_no_cell_comes_twice_and_conversions_without_data_have_no_images(store: Store) -> None:
    keys = fill(store, "zero_shot", "warm_up")
    assert len({tuple(key.values()) for key in keys}) == len(keys)
    for key in keys:
        if key["part"] == "zero_shot" and key["init"] != "sequential":
            assert (key["images"], key["eps"]) == (0, "own")
    assert {key["net"] for key in keys} == set(study.NETS)


def test_the_table_has_the_mean_over_seeds_and_the_cost_in_passes(store: Store, tmp_path: Path) -> None:
    fill(store, "zero_shot", "warm_up")
    summary = report.summarize(store)
    lines = report.markdown(summary).splitlines()
    assert "| lite0 (49) | sequential | 1 | center | 256 | 71.0 ± 1.0 | 0.900 | 60.0 (61.0) | 7 | 4.0 |" in lines
    assert "| lite0 (49) | copy | 1 | own | none | 0.0 | 0.900 | 60.0 (61.0) | 7 |  |" in lines
    report.plot(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
