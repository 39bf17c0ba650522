"""The shift study on a tiny net: each cell once, resumed where it was cut off, averaged seed by seed."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
pytest.importorskip("timm")
import study_shift as study
import study_shift_report as report
from store import Store


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Replace network and images by ones that take no time."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 9)).eval()

    def images(seed: int, split: str, shift: str, severity: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        many = 1200 if split == "train" else 40
        x = torch.randn(many, 3, 8, 8, generator=generator) * (1 + severity) + len(shift)
        return x, torch.randint(9, (many,), generator=generator)

    monkeypatch.setattr(study, "images", images)
    monkeypatch.setattr(study, "source", lambda seed, state="prepared": net)
    return net


def task_of(part: str, *arguments: Any) -> study.Task:
    return part, arguments, list(study.PARTS[part][0](*arguments))


def test_every_task_measures_the_cells_it_announces_and_leaves_the_source_network_alone(tiny: nn.Module) -> None:
    before = copy.deepcopy(tiny.state_dict())
    for task in [task_of("shift", 0, "noise", 5), task_of("shift", 0, "noise", 1), task_of("mixed", 0, "vendors")]:
        rows = study.work(task)
        assert [{k: row[k] for k in key} for row, key in zip(rows, task[2], strict=True)] == task[2]
        assert all(0 <= row["accuracy"] <= 100 for row in rows)
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert not any(module.training for module in tiny.modules())


def test_no_cell_belongs_to_two_tasks() -> None:
    keys = [tuple(key.items()) for _, _, keys in study.tasks() for key in keys]
    assert len(keys) == len(set(keys))
    assert len(study.SHIFTS) == len(set(study.SHIFTS)) == 3 + 25


def test_batch_statistics_are_those_of_each_test_batch(tiny: nn.Module) -> None:
    x, y = study.images(0, "test", "none", 0)
    far = 5 * x + 3  # a batch's own statistics undo this in front of the affine; running ones do not
    live = study.by_batch(tiny)
    assert torch.allclose(live(x[:8]), live(far[:8]), atol=1e-2)
    assert not torch.allclose(tiny(x[:8]), tiny(far[:8]), atol=1e-2)
    assert not torch.allclose(live(x[:8])[:4], live(x[:4]), atol=1e-3)
    assert torch.equal(live[1].running_mean, tiny[1].running_mean)
    assert len(study.hits(live, x, y, 16)) == 40


def test_a_run_that_was_cut_off_goes_on_and_rows_of_another_network_are_measured_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "study_shift.json", "x", study.SEEDS)
    everything = study.tasks()
    assert study.left(store) == everything
    part, arguments, keys = everything[0]
    for key in keys[:5]:
        store.add(key | {"accuracy": 50.0, "source": "new"})
    assert study.left(store) == [(part, arguments, keys[5:]), *everything[1:]]
    assert study.drop_stale(store, {0: "new"}) == 0
    assert study.drop_stale(store, {0: "old"}) == 5
    assert study.left(store) == everything


def test_gains_are_differences_within_a_seed_and_unfinished_cells_are_dashes(tmp_path: Path) -> None:
    common = {"part": "shift", "shift": "fluent", "severity": 0}
    rows = []
    for seed, (source, adapted) in enumerate([(40.0, 50.0), (70.0, 76.0)]):
        rows.append(common | {"seed": seed, "arm": "source", "accuracy": source, "moved_by": 0.5})
        rows.append(common | {"seed": seed, "arm": "recalibrated", "n": 512, "prior": 0, "accuracy": adapted})
    results = report.Results(rows)
    gain = results.gain([("fluent", 0)], arm="recalibrated", n=512, prior=0)
    assert gain.text("+.1f") == "+8.0 ± 2.8"  # the spread of 10 and 6, not that of the accuracies
    assert results.gain([("fluent", 0), ("twemoji", 0)], arm="recalibrated", n=512, prior=0).text() == "-"
    line = next(line for line in report.shift_table(results).splitlines() if line.startswith("| fluent"))
    assert line == "| fluent | 0.50 ± 0.00 | 55.0 ± 21.2 | - | - | - | - | - | - | 63.0 ± 18.4 | - |"


def test_the_learning_rate_is_chosen_by_validation_images_and_not_by_test_images() -> None:
    key = {"part": "tuned", "shift": "fluent", "severity": 0, "arm": "source", "labels": 32}
    rows = [
        key | {"seed": seed, "lr": lr, "val_accuracy": val, "accuracy": test}
        for seed in (0, 1)
        for lr, val, test in [(1e-4, 60.0, 50.0 + seed), (2e-4, 55.0, 90.0)]
    ]
    rate, spread = report.Results(rows).tuned(("fluent", 0), "source", 32)
    assert rate == 1e-4
    assert spread.mean == 50.5


def test_all_tables_and_plots_are_written_from_rows_alone(tiny: nn.Module, tmp_path: Path) -> None:
    store = Store(tmp_path / "study_shift.json", "x", study.SEEDS)
    for task in [task_of("shift", 0, "none", 0), task_of("shift", 0, "noise", 5), task_of("mixed", 0, "vendors")]:
        for row in study.work(task):
            store.add(row)
    text = report.write_report(store)
    written = {path.name for path in tmp_path.iterdir()}
    tables = {f"study_shift{part}.md" for part in ("", "_priors", "_severity", "_mixed", "_tuned")}
    assert written == tables | {"study_shift.json", "study_shift_sizes.png", "study_shift_severity.png"}
    assert "nan" not in text
    assert store.summary["by_shift"]["none"]["source"]["seeds"] == 1
