"""The command: CSV that any program reads, and one clear error before anything is computed."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch
from PIL import Image

import finetune_bn as fbn
from finetune_bn.backbones.card import Transform
from finetune_bn.backbones.predict_command import predict_command, to_csv
from finetune_bn.errors import FinetuneBNError
from tests.models import settle

timm = pytest.importorskip("timm")
pytest.importorskip("safetensors")

CLASSES = ['a "b", c', "=1+1", "猫"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    net = settle(timm.create_model("test_resnet", num_classes=3))
    half = (0.5, 0.5, 0.5)
    return fbn.save(net, tmp_path / "model.safetensors", classes=CLASSES, transform=Transform((32, 32), half, half))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "my, images"
    folder.mkdir()
    for color in ("red", "blue"):
        Image.new("RGB", (40, 40), color).save(folder / f"{color}.png")
    return folder


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_rows_are_the_predictions(model: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict_command(["--model", str(model), str(images), "--top", "2"])
    rows = read(capsys.readouterr().out)
    for row, answer in zip(rows, fbn.load(model).predict(images), strict=True):
        assert row["image"] == answer.image
        assert (row["class"], row["class_2"]) == answer.classes[:2]
        assert float(row["score"]) == pytest.approx(answer.score, rel=1e-5)
        assert float(row["score_2"]) == pytest.approx(answer.scores[1], rel=1e-5)


def test_a_file_is_written_whole_and_its_place_printed(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    predict_command([str(images / "red.png"), "--model", str(model), "--output", str(output)])
    assert capsys.readouterr().out == f"Predictions for 1 images: {output}\n"
    (row,) = read(output.read_text(encoding="utf-8"))
    assert row["image"] == str(images / "red.png")
    assert row["class"] in CLASSES


def test_embeddings_are_one_column_a_number() -> None:
    text = to_csv([fbn.Embedding("a.png", torch.tensor([0.5, -1e-7])), fbn.Embedding("b.png", torch.zeros(2))])
    assert text == "image,0,1\na.png,0.5,-1e-07\nb.png,0,0\n"
    assert to_csv([]) == "image,class,score\n"


def test_on_an_error_no_file_is_written(model: Path, images: Path, tmp_path: Path) -> None:
    (images / "broken.png").write_bytes(b"")
    output = tmp_path / "out.csv"
    with pytest.raises(FinetuneBNError, match=r"broken\.png"):
        predict_command([str(images), "--model", str(model), "--output", str(output)])
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x.png"], "predict: the following arguments are required: --model"),
        (["--model", "MODEL"], "predict: the following arguments are required: images"),
        (["--model", "MODEL", "x.png", "--topp", "1"], "predict: unrecognized arguments: --topp"),
        (["--model", "MODEL", "x.png", "--top", "many"], "predict: argument --top: invalid int value"),
        (["--model", "MODEL", "x.png", "--output", "missing/out.csv"], "output: got 'missing/out.csv'"),
        (["--model", "missing.safetensors", "x.png"], "path: got 'missing.safetensors'.*There is no such file"),
        (["--model", "MODEL", "missing.png"], "images: got 'missing.png'"),
    ],
)
def test_what_is_wrong_is_named(model: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(FinetuneBNError, match=words):
        predict_command([str(model) if argument == "MODEL" else argument for argument in arguments])
