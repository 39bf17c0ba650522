"""`finetune-bn init`: what it finds in a folder, what it chooses, and that the config it writes runs as it is."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightning.pytorch")
pytest.importorskip("jsonargparse")

import yaml
from PIL import Image

from finetune_bn.cli import FinetuneBNCLI, main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune-bn"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def folder_of(root: str, count: int = 10, side: int = 40, parts: tuple[str, ...] = ("",)) -> str:
    """Write noise images of two classes."""
    generator = np.random.default_rng(0)
    for part in parts:
        for name in ("cat", "dog"):
            path = Path(root, part, name)
            path.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / f"{i}.png")
    return root


def written(*args: str) -> dict[str, object]:
    main(["init", "my.yaml", *args])
    config = yaml.safe_load(Path("my.yaml").read_text(encoding="utf-8"))
    flat = config["model"]["init_args"] | config["data"]["init_args"] | config["trainer"]
    return flat | {"test_after_fit": config["test_after_fit"], "policy": config["batch_norm"]["policy"]["class_path"]}


def error_of(*args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["init", *args])
    text = caught.value.code
    assert isinstance(text, str), text
    assert "\n" not in text
    return text


def test_what_it_chose_fits_the_folder_and_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    config = written("--data", folder_of("images"))
    assert {
        key: config[key] for key in ("root", "image_size", "batch_size", "augment", "policy", "test_after_fit")
    } == {
        "root": "images",
        "image_size": 32,
        "batch_size": 2,
        "augment": "light",
        "policy": "Freeze",
        "test_after_fit": True,
    }
    assert config["default_root_dir"] == "runs/my"
    text = capsys.readouterr().out
    assert text.startswith(
        "images: 20 images of 2 classes (12 to train on, 4 to validate, 4 to test), 10 of the rarest"
    )
    for key in ("backbone", "weights", "root", "image_size", "batch_size", "augment", "test_after_fit", "max_epochs"):
        assert f"  {key}: {config[key]}".lower() in text.lower(), key
    assert text.splitlines()[-2:] == [
        "Written: my.yaml",
        "Next: finetune-bn plan --config my.yaml; finetune-bn fit --config my.yaml",
    ]


def test_photos_get_the_size_of_the_weights_and_full_augmentation() -> None:
    config = written("--data", folder_of("photos", count=8, side=200), "--backbone", "tf_efficientnet_lite0")
    assert (config["image_size"], config["augment"]) == (224, "full")
    assert (config["backbone"], config["weights"]) == ("tf_efficientnet_lite0", "package")


@pytest.mark.parametrize(
    ("parts", "fractions", "tested"),
    [
        (("train", "val", "test"), set(), True),
        (("train", "valid"), set(), False),
        (("train",), {"val_fraction"}, False),
        (("",), {"val_fraction", "test_fraction"}, True),
    ],
)
def test_ready_splits_are_taken_as_they_are(parts: tuple[str, ...], fractions: set[str], tested: bool) -> None:
    config = written("--data", folder_of("images", parts=parts))
    assert {key for key in config if key.endswith("fraction")} == fractions
    assert config["test_after_fit"] is tested


def test_the_config_is_trained_and_tested_as_it_was_written() -> None:
    main(["init", "my.yaml", "--data", folder_of("my images")])
    small = ("--model.backbone", "test_efficientnet", "--model.weights", "none", "--trainer.accelerator", "cpu")
    quiet = ("--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1", "--data.num_workers", "0")
    cli = FinetuneBNCLI(["fit", "--config", "my", *small, *quiet])
    assert "test_accuracy" in cli.trainer.callback_metrics
    assert cli.model.class_names == ["cat", "dog"]
    assert Path("runs/my/lightning_logs").is_dir()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("my.yaml",), "init: the following arguments are required: --data. finetune-bn init my_images.yaml"),
        ((), "init: the following arguments are required: file, --data."),
        (("my.yaml", "--data", "nowhere"), "root: got 'nowhere'; allowed: an existing folder with one sub-folder of "),
        (("my.yaml", "--data", "empty"), "allowed: one sub-folder of images per class"),
        (("my.yaml", "--data", "images"), "data: got 'images'; allowed: a folder with more images of each class"),
        (("my.yaml", "--data", "imageless"), "class folder without images: got ["),
        (("my.yaml", "--data", "one"), "classes: got ['cat']; allowed: two classes or more."),
        (("my.yaml", "--data", "broken"), "data: got 'broken/cat/0.jpg'; allowed: an image that can be read."),
        (("there.yaml", "--data", "images"), "file: got 'there.yaml'; allowed: a file that is not there yet."),
        (("my.txt", "--data", "images"), "file: got 'my.txt'; allowed: a name that ends in .yaml."),
        (("no/my.yaml", "--data", "images"), "file: got 'no/my.yaml'; allowed: a file in a folder that there is."),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(args: tuple[str, ...], words: str) -> None:
    folder_of("images", count=2)
    Path("there.yaml").write_text("", encoding="utf-8")
    for name in ("empty", "imageless/cat", "imageless/dog", "one/cat", "broken/cat", "broken/dog"):
        Path(name).mkdir(parents=True)
    for name in ("one/cat", "broken/cat", "broken/dog"):
        for i in range(10):
            Path(name, f"{i}.jpg").write_text("no image", encoding="utf-8")
    before = sorted(Path().rglob("*"))
    assert words in error_of(*args)
    assert sorted(Path().rglob("*")) == before
