"""Image files become 8-bit RGB, or one error that names them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from finetune_bn.errors import BadData
from finetune_bn.utilities.images import as_rgb, open_rgb


def test_sixteen_bit_gray_is_scaled_not_clipped() -> None:
    levels = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    for image in (Image.fromarray(levels), Image.fromarray(levels.astype(np.int32))):
        assert np.asarray(as_rgb(image))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize(
    ("pixels", "message"),
    [(np.ones((2, 2), np.float32), "range is unknown"), (np.full((2, 2), 70000, np.int32), "do not fit 16 bits")],
)
def test_pixels_without_an_agreed_white_are_refused(pixels: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_rgb(Image.fromarray(pixels))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "I;16", "LA"])
def test_a_file_of_any_color_mode_is_opened_as_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (5, 7)).save(path)
    image = open_rgb(path)
    assert (image.mode, image.size) == ("RGB", (5, 7))
    image.load()


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "truncated"])
def test_a_file_that_cannot_be_read_whole_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "cat.png"
    Image.effect_noise((64, 64), 50.0).save(path)
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    with pytest.raises(BadData, match=r"image: got .*cat\.png'; allowed: an image file that can be read whole"):
        open_rgb(path)


def test_an_image_of_more_pixels_than_pillow_takes_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (40, 40)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadData, match=r"bomb\.png.*DecompressionBombError"):
        open_rgb(tmp_path / "bomb.png")


def test_what_is_no_file_is_refused_and_a_pipe_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "missing.png", "."):
        with pytest.raises(BadData, match="There is no such file"):
            open_rgb(tmp_path / name)
