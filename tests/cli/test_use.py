"""From the command: a model file answers for any image, and a second run leaves the config of the first alone."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from PIL import Image

import finetune_bn as fbn
from finetune_bn.backbones.card import Transform
from finetune_bn.cli import entry, main
from tests.models import settle
from tests.timm_nets import timm

pytest.importorskip("jsonargparse")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    net = settle(timm.create_model("test_resnet", num_classes=3))
    half = (0.5, 0.5, 0.5)
    path = tmp_path / "model.safetensors"
    return fbn.save(net, path, classes=["a", "b", "c"], transform=Transform((32, 32), half, half))


@pytest.mark.parametrize("form", ["--model {}", "--model={}"])
def test_predict_of_a_model_file_takes_images_and_no_config(
    model: Path, form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry, "_run", lambda args: pytest.fail("Lightning was asked"))
    image = model.with_name("red.png")
    Image.new("RGB", (40, 40), "red").save(image)
    main(["predict", *form.format(model).split(), str(image)])
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["image"] == str(image)
    assert row["class"] == fbn.load(model).predict(image).label


def test_a_model_file_that_is_not_there_is_one_line() -> None:
    with pytest.raises(SystemExit, match=r"finetune-bn: error: path: got 'missing\.safetensors'.*no such file"):
        main(["predict", "--model", "missing.safetensors", "image.jpg"])


@pytest.mark.parametrize("args", [["--config", "quickstart"], ["--model", "ImageClassification"], ["--help"], []])
def test_predict_of_a_config_or_a_class_is_lightnings(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(entry, "_run", asked.append)
    main(["predict", *args])
    assert asked == [["predict", *args]]


def test_runs_in_one_folder_leave_each_others_config(tmp_path: Path) -> None:
    where = ["--trainer.logger", "false", "--trainer.default_root_dir", str(tmp_path)]
    quiet = ["--trainer.max_steps", "1", "--trainer.enable_checkpointing", "false", "--trainer.accelerator", "cpu"]
    for width in ("4", "5", "4"):
        net = ["--model", "tests.foreign.Net", "--model.width", width, "--data", "tests.foreign.Data"]
        main(["fit", *net, *where, *quiet])
    configs = sorted(path.name for path in tmp_path.glob("run_config*.yaml"))
    assert configs == ["run_config-1.yaml", "run_config.yaml"]  # the third is as the first
    widths = ["width: 5", "width: 4"]
    assert all(word in (tmp_path / name).read_text("utf-8") for name, word in zip(configs, widths, strict=True))
