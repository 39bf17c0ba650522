"""`finetune-bn predict` writes what it found: one line an image, and nothing where it cannot."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning.pytorch")
pytest.importorskip("jsonargparse")

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from finetune_bn.cli import FinetuneBNCLI, main
from finetune_bn.cli.predictions import write_predictions
from finetune_bn.errors import FinetuneBNError

SMALL = (
    *("--config", "quickstart", "--model.weights", "none", "--model.backbone", "test_efficientnet"),
    *("--data.image_size", "32", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.limit_predict_batches", "1"),
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune-bn"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def rows(path: str | Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def test_classes_and_scores_of_every_image_are_written_and_the_file_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli = FinetuneBNCLI(["predict", *SMALL])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "Predictions of 192 images: runs/quickstart/lightning_logs/version_0/predictions.csv"
    header, *found = rows(last.partition(": ")[2])
    names = cli.model.class_names
    assert header == ["file", "domain", "class", "score", *names]
    sets = [loader.dataset for loader in cli.trainer.predict_dataloaders]
    assert [row[0] for row in found] == [name for images in sets for name in images.names[:64]]
    assert {row[1] for row in found} == {"noto", "twemoji", "fluent"}
    image = sets[1][5][0][None]
    with torch.no_grad():
        expected = cli.model.eval()(image).softmax(1)[0]
    row = found[64 + 5]
    torch.testing.assert_close(torch.tensor([float(score) for score in row[4:]]), expected, rtol=1e-4, atol=1e-5)
    assert row[2] == names[int(expected.argmax())]
    assert float(row[3]) == max(float(score) for score in row[4:])


def test_embeddings_are_written_to_the_file_that_was_asked_for() -> None:
    pytest.importorskip("pytorch_metric_learning")
    args = ["--config", "metric_learning", *SMALL[2:], "--model.dimension", "4", "--output", "embeddings.csv"]
    main(["predict", *args])
    header, *found = rows("embeddings.csv")
    assert header == ["file", "domain", "0", "1", "2", "3"]
    norms = torch.tensor([[float(value) for value in row[2:]] for row in found]).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(len(found)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("output", ["nowhere/x.csv", "."])
def test_a_file_that_cannot_be_is_refused_before_the_work(output: str) -> None:
    with pytest.raises(SystemExit, match=r"output: got .*; allowed: a file in a folder that there is"):
        main(["predict", *SMALL, "--output", output])


class Named(torch.utils.data.Dataset[Any]):
    names = ("a\udcff.png", "b,c.png")


def test_other_modules_are_written_with_numbered_columns_and_odd_names_as_they_are() -> None:
    loader: Any = DataLoader(Named(), sampler=range(2))
    count = write_predictions(Path("x.csv"), pl.LightningModule(), loader, [torch.tensor([1.5]), torch.tensor([-2.0])])
    assert count == 2
    assert rows("x.csv") == [["file", "0"], ["a\udcff.png", "1.5"], ["b,c.png", "-2"]]
    unnamed: Any = DataLoader(torch.utils.data.TensorDataset(torch.zeros(2)))
    write_predictions(Path("x.csv"), pl.LightningModule(), [unnamed, unnamed], [[torch.ones(2, 2)], [torch.ones(1, 2)]])
    assert [row[:2] for row in rows("x.csv")] == [["file", "domain"], ["0/0", "0"], ["0/1", "0"], ["1/0", "1"]]


def test_what_is_no_tensor_with_a_row_an_image_is_refused_and_the_old_file_stays() -> None:
    Path("x.csv").write_text("old", encoding="utf-8")
    loader: Any = DataLoader(Named(), sampler=range(2))
    with pytest.raises(FinetuneBNError, match=r"predict_step: got \['dict'\]; allowed: one tensor with a row"):
        write_predictions(Path("x.csv"), pl.LightningModule(), loader, [{"boxes": 1}])
    assert Path("x.csv").read_text(encoding="utf-8") == "old"
