from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from torchvision.datasets import VisionDataset
from torchvision.datasets.utils import extract_archive

from finetune_bn.data import TorchvisionData
from finetune_bn.errors import BadData, MissingDependency

FAKE: dict[str, Any] = {"name": "FakeData", "options": {"size": 40, "image_size": [3, 12, 12], "num_classes": 4}}


def data_of(**kwargs: Any) -> TorchvisionData:
    return TorchvisionData(**{"image_size": 12, "batch_size": 8, "num_workers": 0, **kwargs})


def write_mnist(root: Path) -> np.ndarray[Any, Any]:
    """Write MNIST's four files with 20 + 10 random digits; return the test images."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("t10k", 10)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
    return images


def test_fake_data_has_no_splits_and_is_cut_into_three() -> None:
    data = data_of(**FAKE, val_fraction=0.2, test_fraction=0.3)
    data.prepare_data()
    data.setup()
    sizes = [len(data.split(name)) for name in ("train", "val", "test")]
    assert sum(sizes) == 40
    assert sizes[1] in range(5, 12)
    assert data.num_classes == 4
    assert data.class_names == ["0", "1", "2", "3"]
    original = torchvision.datasets.FakeData(size=40, image_size=(3, 12, 12), num_classes=4)
    images = data.image_set("test")
    assert images.labels.tolist() == [int(original[index][1]) for index in data.split("test")]
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (8, 3, 12, 12)
    assert batch.labels.dtype == torch.int64


def test_train_true_and_false_become_train_and_test_and_gray_becomes_rgb(tmp_path: Path) -> None:
    pixels = write_mnist(tmp_path)
    data = data_of(name="MNIST", root=str(tmp_path), image_size=28, val_fraction=0.5, mean=(0,) * 3, std=(1,) * 3)
    assert (len(data.split("train")), len(data.split("val")), len(data.split("test"))) == (10, 10, 10)
    assert sorted(data.image_set("train").labels.tolist()) == list(range(10))
    test = data.image_set("test")
    assert test.labels.tolist() == list(range(10))
    assert test.names[3] == "MNIST test[3]"
    image = test[3][0]
    assert torch.equal(image[0], image[1])
    torch.testing.assert_close(image[0], torch.tensor(pixels[3] / 255, dtype=torch.float32))
    assert data.class_names[3] == "3 - three"


def test_the_class_names_of_cifar_are_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        entry = {"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(entry))
    names = [f"class {number}" for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    # the files are right in form but have other checksums than the published ones
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = data_of(name="CIFAR10", root=str(tmp_path), val_fraction=0.2)
    assert (len(data.split("train")), len(data.split("val")), len(data.split("test"))) == (40, 10, 10)
    assert data.class_names == names
    assert data.contents.source.in_memory


class Official(VisionDataset):
    """A data set with splits of given words and sizes; images of label * 10."""

    words: ClassVar[dict[str, int]] = {}

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        super().__init__(root)
        if split not in self.words:
            raise ValueError(f"Unknown value '{split}' for argument split. Valid values are {set(self.words)}.")
        self.split = split
        self._labels = self.labels_of(split)

    def labels_of(self, split: str) -> Any:
        return [number % 3 for number in range(self.words[split])]

    def __len__(self) -> int:
        return self.words[self.split]

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return Image.new("L", (6, 6), 10 * (index % 3)), self._labels[index]


Register = Callable[..., None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Return a function that makes a subclass of `Official` known to torchvision as `Made`."""

    def add(words: dict[str, int], **attributes: Any) -> None:
        made = type("Made", (Official,), {"words": words, **attributes})
        monkeypatch.setattr(torchvision.datasets, "Made", made, raising=False)
        monkeypatch.setattr(torchvision.datasets, "__all__", (*torchvision.datasets.__all__, "Made"))

    return add


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ({"train": 30, "val": 9, "test": 12}, (30, 9, 12)),
        ({"train": 30, "valid": 9, "test": 12}, (30, 9, 12)),
        ({"trainval": 30, "test": 12}, (24, 6, 12)),
        ({"train": 30, "val": 9}, (24, 6, 9)),
        ({"train-standard": 30, "val": 9}, (24, 6, 9)),
    ],
)
def test_official_splits_are_found_and_missing_ones_are_made(
    words: dict[str, int], sizes: tuple[int, int, int], register: Register, tmp_path: Path
) -> None:
    register(words)
    data = data_of(name="Made", root=str(tmp_path), val_fraction=0.2)
    data.setup()
    assert tuple(len(data.split(name)) for name in ("train", "val", "test")) == sizes
    chosen = [index for name in ("train", "val", "test") for index in data.split(name)]
    assert sorted(chosen) == list(range(sum(words.values())))


def test_a_split_chosen_in_options_is_cut_by_the_seed(register: Register, tmp_path: Path) -> None:
    register({"train": 30, "extra": 60})
    data = data_of(name="Made", root=str(tmp_path), options={"split": "extra"}, val_fraction=0.1, test_fraction=0.2)
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [42, 6, 12]
    with pytest.raises(BadData, match=r"options: .*Unknown value 'other' for argument split"):
        data_of(name="Made", root=str(tmp_path), options={"split": "other"}).setup("fit")


def test_an_official_split_without_labels_is_left_out_and_named(register: Register, tmp_path: Path) -> None:
    def labels_of(self: Official, split: str) -> Any:
        return [None] * self.words[split] if split == "test" else Official.labels_of(self, split)

    register({"train": 30, "val": 9, "test": 12}, labels_of=labels_of)
    data = data_of(name="Made", root=str(tmp_path), val_fraction=0.2)
    with pytest.warns(UserWarning, match="Made: the official test split has no labels and is left out"):
        data.setup()
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [24, 6, 9]


def test_labels_that_disagree_with_the_items_are_read_from_the_items(register: Register, tmp_path: Path) -> None:
    def item(self: Official, index: int) -> tuple[Image.Image, int]:
        return Image.new("L", (6, 6)), (self._labels[index] + 1) % 3

    register({"train": 30, "val": 9, "test": 12}, __getitem__=item)
    data = data_of(name="Made", root=str(tmp_path))
    assert data.image_set("train").labels.tolist() == [(index + 1) % 3 for index in range(30)]


def test_a_target_that_is_no_class_number_is_refused(register: Register, tmp_path: Path) -> None:
    register({"train": 30}, labels_of=lambda self, split: [torch.zeros(40)] * self.words[split])
    with pytest.raises(BadData, match=r"Made, whose target is a Tensor of shape \(40,\).*one class number per image"):
        data_of(name="Made", root=str(tmp_path)).setup("fit")


def test_unreadable_items_are_named_or_skipped(register: Register, tmp_path: Path) -> None:
    def item(self: Official, index: int) -> tuple[Image.Image, int]:
        if index in (0, 4):
            raise OSError("image file is truncated")
        return Official.__getitem__(self, index)

    register({"train": 30, "val": 9, "test": 12}, __getitem__=item)
    data = data_of(name="Made", root=str(tmp_path))
    with pytest.raises(BadData, match=r"image: got 'Made train\[[04]\]'.*truncated"):
        list(data.train_dataloader())
    data = data_of(name="Made", root=str(tmp_path), on_bad_image="skip")
    with pytest.warns(UserWarning, match="2 of 30 train images cannot be read"):
        data.setup("fit")
    assert data.skipped == ["Made train[0]", "Made train[4]", "Made val[0]", "Made val[4]"]
    assert sum(len(batch.labels) for batch in data.train_dataloader()) == 28


def test_a_package_that_a_data_set_needs_is_named(register: Register, tmp_path: Path) -> None:
    def init(self: Official, root: str, split: str = "train") -> None:
        raise ModuleNotFoundError("No module named 'scipy'")

    register({"train": 3}, __init__=init)
    with pytest.raises(MissingDependency, match=r"torchvision\.datasets\.Made needs a package .*scipy"):
        data_of(name="Made", root=str(tmp_path)).setup("fit")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFAR-10", "name: got 'CIFAR-10'; allowed: .*Did you mean 'CIFAR10'"),
        ("cifar10", "Did you mean 'CIFAR10'"),
        ("VOCDetection", "name: got 'VOCDetection'; allowed: a data set with one class per image"),
        ("ImageFolder", "Use ImageFolderData"),
        ("VisionDataset", "name: got 'VisionDataset'"),
        ("wrap_dataset_for_transforms_v2", "name: got 'wrap_dataset"),
    ],
)
def test_a_name_that_is_no_classification_set_is_refused(name: str, message: str) -> None:
    with pytest.raises(BadData, match=message):
        TorchvisionData(name)


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "Flowers102", "EuroSAT", "Food101", "GTSRB", "OxfordIIITPet"])
def test_a_data_set_that_is_not_there_says_to_download_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=f"root: got .*; allowed: a folder that holds .*{name}.*Pass download: true"):
        data_of(name=name, root=str(tmp_path)).setup("fit")


def test_a_download_without_a_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(BadData, match=r"root: .*Network is unreachable.*Without a network, fetch it elsewhere"):
        data_of(name="CIFAR10", root=str(tmp_path), download=True).prepare_data()


def test_options_are_checked_by_name_and_missing_ones_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"options: got 'sise'; allowed: .*Did you mean 'size'"):
        data_of(name="FakeData", options={"sise": 3})
    with pytest.raises(BadData, match=r"options: got {}; allowed: with \['split'\], which .*EMNIST needs"):
        data_of(name="EMNIST", root=str(tmp_path)).setup("fit")


@pytest.mark.parametrize("member", ["../outside.txt", "/tmp/finetune_bn_outside.txt"])
def test_an_archive_that_would_write_outside_its_folder_is_refused(
    register: Register, tmp_path: Path, member: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / "data.tar", "w") as archive:
        entry = tarfile.TarInfo(member)
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"evil"))
        if member.startswith("/"):
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, member
            archive.addfile(link)

    def init(self: Official, root: str, split: str = "train", download: bool = False) -> None:
        extract_archive(str(Path(root, "data.tar")), root)

    register({"train": 8}, __init__=init)
    before = tarfile.TarFile.extraction_filter
    with pytest.raises(BadData, match=r"all stay in the folder that it is unpacked in\. It said: .*(outside|absolute)"):
        data_of(name="Made", root=str(root)).setup()
    assert not (tmp_path / "outside.txt").exists()
    assert not Path("/tmp/finetune_bn_outside.txt").exists()
    assert tarfile.TarFile.extraction_filter is before
