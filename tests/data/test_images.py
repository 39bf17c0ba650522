from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune_bn.data import images
from finetune_bn.data.images import Batch, ImageSet, ImageSource, collate, find_unreadable
from finetune_bn.data.order import Draw
from finetune_bn.errors import BadData

Spoil = Callable[[Path], list[Path]]


class Files(ImageSource):
    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.labels = [0] * len(paths)
        self.domains = ["all"] * len(paths)

    def open(self, index: int) -> Image.Image:
        with Image.open(self.paths[index]) as image:
            image.load()
            return image

    def name(self, index: int) -> str:
        return str(self.paths[index])


def noise(image: Image.Image) -> torch.Tensor:
    return torch.rand(3, 2, 2)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "I;16", "LA"])
def test_every_color_mode_is_read_as_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (5, 7)).save(path)
    image = Files([path]).read(0)
    assert (image.mode, image.size) == ("RGB", (5, 7))


def test_each_kind_of_bad_file_is_one_error_that_names_it(tmp_path: Path, spoil: Spoil) -> None:
    bad = [*spoil(tmp_path), tmp_path / "missing.png"]
    source = Files(bad)
    for index, path in enumerate(bad):
        with pytest.raises(BadData, match=f"image: got .*{path.name}.*can be read whole.*on_bad_image: skip"):
            source.read(index)


def test_find_unreadable_names_all_bad_files_with_their_reason_and_no_good_one(tmp_path: Path, spoil: Spoil) -> None:
    good = tmp_path / "good.png"
    Image.new("RGB", (4, 4)).save(good)
    found = find_unreadable(Files([good, *spoil(tmp_path), good]), [4, 3, 2, 1, 0])
    assert sorted(found) == [1, 2, 3]
    assert "truncated" in found[1]
    assert "UnidentifiedImageError" in found[2]


def test_the_progress_bar_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "BAR_FROM", 2)
    assert list(images.with_bar(iter("abc"), 3, "Reading")) == ["a", "b", "c"]


def test_a_batch_is_a_tuple_of_float_images_and_int64_labels() -> None:
    batch = collate([(torch.zeros(3, 4, 4), 2), (torch.ones(3, 4, 4), 0)])
    assert isinstance(batch, tuple)
    inputs, labels = batch
    assert inputs.shape == (2, 3, 4, 4)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [2, 0]
    # Lightning rebuilds batches by type when it moves them to a device
    assert Batch(*batch) == batch


def test_an_augmented_image_depends_on_its_draw_and_on_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (4, 4)).save(path)
    data = ImageSet(Files([path]), [0], noise)
    first = data[Draw(0, seed=1)][0]
    before = torch.get_rng_state()
    torch.rand(100)
    moved = torch.get_rng_state()
    assert torch.equal(data[Draw(0, seed=1)][0], first)
    assert torch.equal(torch.get_rng_state(), moved)
    assert not torch.equal(before, moved)
    assert not torch.equal(data[Draw(0, seed=2)][0], first)
    # a plain number, as another sampler gives it, draws anew each time
    assert not torch.equal(data[0][0], data[0][0])
