from __future__ import annotations

import os
import shutil
import socket
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_bn.data import ImageFolderData
from finetune_bn.errors import BadData

MakeFolder = Callable[..., Path]


def data_of(root: Path, **kwargs: Any) -> ImageFolderData:
    return ImageFolderData(str(root), **{"image_size": 8, "num_workers": 0, "batch_size": 4, **kwargs})


def test_ready_splits_are_used_as_they_are(make_folder: MakeFolder) -> None:
    root = make_folder("train", "val", "test")
    data = data_of(root)
    for split in ("train", "val", "test"):
        images = data.image_set(split)
        expected = sorted(str(path) for path in (root / split).rglob("*.png"))
        assert images.names == expected
        assert images.labels.tolist() == [0] * 4 + [1] * 4
    assert data.class_names == ["cat", "dog"]
    assert data.domains == ["all"]
    assert len(data.val_dataloader()) == len(data.test_dataloader()) == 1
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (4, 3, 8, 8)


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_the_validation_folder_are_understood(name: str, make_folder: MakeFolder) -> None:
    data = data_of(make_folder("train", name))
    assert len(data.split("train")) == len(data.split("val")) == 8


def test_one_folder_is_split_by_the_seed_class_by_class(make_folder: MakeFolder) -> None:
    root = make_folder(count=20)
    data = data_of(root, val_fraction=0.1, test_fraction=0.2)
    sets = {split: data.image_set(split) for split in ("train", "val", "test")}
    assert {split: torch.bincount(images.labels).tolist() for split, images in sets.items()} == {
        "train": [14, 14],
        "val": [2, 2],
        "test": [4, 4],
    }
    assert len({name for images in sets.values() for name in images.names}) == 40
    again = data_of(root, val_fraction=0.1, test_fraction=0.2)
    assert again.image_set("test").names == sets["test"].names
    assert data_of(root, val_fraction=0.1, test_fraction=0.2, seed=1).image_set("test").names != sets["test"].names


def test_the_split_does_not_depend_on_where_the_folder_lies(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder(count=20)
    moved = shutil.copytree(root, tmp_path / "elsewhere" / "images")
    assert data_of(root).split("test") == data_of(moved).split("test")


def test_without_a_validation_folder_a_part_of_train_becomes_it(make_folder: MakeFolder) -> None:
    root = make_folder("train", "test", count=10)
    data = data_of(root, val_fraction=0.2)
    assert (len(data.split("train")), len(data.split("val")), len(data.split("test"))) == (16, 4, 20)
    assert all(Path(name).is_relative_to(root / "train") for name in data.image_set("val").names)
    assert all(Path(name).is_relative_to(root / "test") for name in data.image_set("test").names)


def test_without_a_test_folder_training_goes_and_testing_is_a_clear_error(make_folder: MakeFolder) -> None:
    data = data_of(make_folder("train", "val"))
    data.setup("fit")
    with pytest.raises(BadData, match=r"test set: got \[\]; allowed: one image or more"):
        data.setup("test")


def test_a_class_may_be_called_like_a_split(make_folder: MakeFolder) -> None:
    data = data_of(make_folder(classes=("bus", "test", "train"), count=8), val_fraction=0.25)
    assert data.class_names == ["bus", "test", "train"]


def test_subfolders_of_a_class_count_and_suffixes_ignore_case(make_folder: MakeFolder) -> None:
    root = make_folder(count=8)
    (root / "cat" / "deep" / "er").mkdir(parents=True)
    (root / "cat" / "0.png").rename(root / "cat" / "deep" / "er" / "0.PNG")
    data = data_of(root, val_fraction=0.0, test_fraction=0.0)
    assert torch.bincount(data.image_set("train").labels).tolist() == [8, 8]


def test_what_is_no_image_is_left_alone_and_named(make_folder: MakeFolder) -> None:
    root = make_folder("train", "val")
    left = [root / "readme.txt", root / "train" / "list.csv", root / "train" / "cat" / "notes.txt"]
    for path in left:
        path.write_text("x")
    (root / "meta").mkdir()
    (root / "train" / "cat" / ".hidden").write_text("x")
    data = data_of(root)
    with pytest.warns(UserWarning, match="4 files or folders are not images or splits and left alone: .*meta"):
        data.setup("fit")
    assert sorted(data.ignored) == sorted(map(str, [*left, root / "meta"]))
    assert len(data.split("train")) == 8


def test_a_folder_of_images_only_gives_no_warning(make_folder: MakeFolder) -> None:
    data = data_of(make_folder("train", "val"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("fit")


def test_domains_from_subfolders_have_one_loader_each(make_folder: MakeFolder) -> None:
    data = data_of(make_folder("photo", "art", count=20), domains_from="subfolder")
    assert data.domains == ["art", "photo"]
    assert set(data.image_set("train").domains) == {"art", "photo"}
    for loaders in (data.val_dataloader(), data.test_dataloader()):
        assert [set(loader.dataset.domains) for loader in loaders] == [{"art"}, {"photo"}]  # type: ignore[attr-defined]
        assert len({len(loader.dataset) for loader in loaders}) == 1  # type: ignore[arg-type]


def test_training_may_be_cut_to_some_domains(make_folder: MakeFolder) -> None:
    root = make_folder("photo", "art", count=20)
    data = data_of(root, domains_from="subfolder", train_domains=["photo"])
    assert set(data.image_set("train").domains) == {"photo"}
    assert data.domains == ["art", "photo"]
    with pytest.raises(BadData, match=r"train_domains: got 'foto'; allowed: art, photo.*Did you mean 'photo'"):
        data_of(root, domains_from="subfolder", train_domains=["foto"]).setup("fit")


def test_domains_work_with_ready_splits(make_folder: MakeFolder) -> None:
    root = make_folder("train/photo", "val/photo", "val/art", "test/photo", "test/art")
    data = data_of(root, domains_from="subfolder")
    assert data.domains == ["art", "photo"]
    assert set(data.image_set("train").domains) == {"photo"}
    shutil.rmtree(root / "test" / "art")
    with pytest.raises(BadData, match=r"domains of val and test: .*allowed: the same ones"):
        _ = data_of(root, domains_from="subfolder").domains


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"root: got .*nowhere.*; allowed: an existing folder"):
        ImageFolderData(str(tmp_path / "nowhere"))


def test_a_root_without_classes_is_named(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(BadData, match=r"root \(.*\): got \[\]; allowed: one sub-folder of images per class"):
        data_of(tmp_path).setup("fit")


def test_a_root_one_level_too_high_is_noticed(make_folder: MakeFolder) -> None:
    with pytest.raises(BadData, match=r"two classes or more.*one level too high"):
        data_of(make_folder().parent, val_fraction=0.25).setup("fit")


def test_classes_that_differ_between_splits_are_named(make_folder: MakeFolder) -> None:
    root = make_folder("train", "val", "test")
    (root / "val" / "dog").rename(root / "val" / "Dog")
    with pytest.raises(BadData, match=r"missing in val: \['dog'\]; only in val: \['Dog'\]"):
        data_of(root).setup("fit")


def test_classes_that_differ_between_domains_are_named(make_folder: MakeFolder) -> None:
    root = make_folder("art", "photo", count=20)
    shutil.rmtree(root / "photo" / "cat")
    with pytest.raises(BadData, match=r"missing in photo: \['cat'\].*allowed: the same class folders in art and photo"):
        data_of(root, domains_from="subfolder").setup("fit")


def test_an_empty_class_folder_is_named(make_folder: MakeFolder) -> None:
    root = make_folder("train", "val")
    (root / "train" / "bird").mkdir()
    (root / "train" / "bird" / "readme.txt").write_text("soon")
    with pytest.raises(BadData, match=r"class folder without images: got .*bird.*Remove the folder or add images"):
        data_of(root).setup("fit")


def test_val_without_train_is_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(BadData, match=r"got \['val', 'test'\]; allowed: a train folder beside them"):
        data_of(make_folder("val", "test")).setup("fit")


def test_two_validation_folders_are_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(BadData, match=r"got \['val', 'valid'\]; allowed: one of them"):
        data_of(make_folder("train", "val", "valid")).setup("fit")


def test_bad_domain_arguments_are_refused(make_folder: MakeFolder) -> None:
    root = make_folder()
    with pytest.raises(BadData, match="domains_from: got 'folder'; allowed: subfolder"):
        data_of(root, domains_from="folder")
    with pytest.raises(BadData, match=r"train_domains: .*nothing without domains_from: subfolder"):
        data_of(root, train_domains=["art"])
    with pytest.raises(BadData, match="Leave domains_from out"):
        data_of(root / "cat", domains_from="subfolder").setup("fit")


# Links, and what is no file


def test_a_link_in_a_circle_adds_no_image_and_is_named(make_folder: MakeFolder) -> None:
    """faults.md F14: a loop turned 24 files into 504, and test images were trained on."""
    root = make_folder("train", "test", count=6)
    (root / "train" / "cat" / "again").symlink_to(root, target_is_directory=True)
    (root / "train" / "dog" / "here").symlink_to(root / "train" / "dog", target_is_directory=True)
    data = data_of(root, val_fraction=0.2)
    with pytest.warns(
        UserWarning, match=r"2 files or folders .*train/cat/again \(a link to a folder above it, .*images\)"
    ):
        data.setup()
    names = [name for split in ("train", "val", "test") for name in data.image_set(split).names]
    assert len(names) == len(set(names)) == 24
    assert all("/test/" not in name for split in ("train", "val") for name in data.image_set(split).names)


@pytest.mark.parametrize("what", ["cat", "cat/1.png"])
def test_an_image_of_another_split_behind_a_link_is_refused_by_both_names(make_folder: MakeFolder, what: str) -> None:
    root = make_folder("train", "test")
    (root / "train" / "cat" / ("linked" + Path(what).suffix)).symlink_to(root / "test" / what)
    with pytest.raises(BadData, match=r"test/cat.* \(test class cat\)'.* Remove one of them: .*train/cat/linked"):
        data_of(root).setup()


def test_an_image_of_another_class_behind_a_link_is_refused(make_folder: MakeFolder) -> None:
    root = make_folder()
    (root / "bird").symlink_to(root / "cat", target_is_directory=True)
    with pytest.raises(BadData, match=r"cat \(class cat\)'.*Remove one of them: .*bird \(class bird\) is the same"):
        data_of(root).setup()


def test_links_to_folders_elsewhere_are_followed_once(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder(count=20)
    shutil.move(root / "cat", tmp_path / "cats")
    (root / "cat").symlink_to(tmp_path / "cats", target_is_directory=True)
    (root / "cat" / "twice.png").symlink_to(tmp_path / "cats" / "0.png")
    data = data_of(root)
    with pytest.warns(UserWarning, match=r"twice.png \(the same as .*0.png\)"):
        data.setup()
    assert sum(len(data.split(split)) for split in ("train", "val", "test")) == 40


def test_what_does_not_end_when_read_is_left_out_and_named(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(count=20)
    os.mkfifo(root / "cat" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(root / "dog")  # the path of a socket must be short
        listener.bind("wire.png")
        (root / "dog" / "zero.png").symlink_to("/dev/zero")
        data = data_of(root)
        with pytest.warns(UserWarning, match=r"pipe.png \(a FIFO, no file\).*wire.png \(a socket.*zero.png \(a device"):
            data.setup()
    assert sum(len(data.split(split)) for split in ("train", "val", "test")) == 40


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(make_folder: MakeFolder) -> None:
    root = make_folder(count=20)
    (root / "cat" / "gone.png").symlink_to(root / "nowhere.png")
    data = data_of(root, on_bad_image="skip", val_fraction=0, test_fraction=0)
    with pytest.warns(UserWarning, match="1 of 41 train images cannot be read and are left out: .*gone.png"):
        data.setup("fit")


@pytest.mark.parametrize("place", [b"cat/\xff\xfe.png", b"\xe9t\xe9/1.png"])
def test_a_name_that_is_no_utf8_is_refused_by_name(make_folder: MakeFolder, place: bytes) -> None:
    root = make_folder()
    path = os.path.join(os.fsencode(root), place)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    shutil.copy(root / "cat" / "0.png", path)
    with pytest.raises(BadData, match=r"file name: got b'.*\\x(ff|e9).*names in UTF-8.*Rename it"):
        data_of(root).setup()


def test_an_image_too_large_to_be_decoded_is_refused_before_it_fills_the_memory(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PNG of 20,000 x 20,000 white pixels is 50 KB on the disk and 1.2 GB in memory."""
    root = make_folder(count=1)
    row = zlib.compress(b"\x00" * (20_000 // 8 + 1) * 20_000, 9)
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", row), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    (root / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    data = data_of(root, val_fraction=0, test_fraction=0)
    with pytest.raises(BadData, match=r"cat/0.png'.*exceeds limit.*Scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS"):
        data.image_set("train")[0]
