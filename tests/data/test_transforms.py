from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from finetune_bn.data.order import randomness
from finetune_bn.data.transforms import AUGMENTS, checked_normalization, image_transform, model_normalization
from finetune_bn.errors import BadData

HALF = (0.5, 0.5, 0.5)


def left_red_right_blue(side: int = 32) -> Image.Image:
    pixels = np.zeros((side, side, 3), dtype=np.uint8)
    pixels[:, : side // 2, 0] = 255
    pixels[:, side // 2 :, 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_every_strength_gives_a_float_tensor_of_the_size_asked_for(augment: str) -> None:
    image = Image.new("RGB", (50, 30), (255, 0, 0))
    out = image_transform(augment, 24, HALF, HALF, "bicubic", 1.0)(image)  # type: ignore[arg-type]
    assert out.shape == (3, 24, 24)
    assert out.dtype == torch.float32


def test_none_only_normalizes_an_image_that_has_the_size() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    out = image_transform("none", 16, mean, std, "bicubic", 1.0)(Image.fromarray(pixels))
    expected = ((pixels / 255.0 - mean) / std).transpose(2, 0, 1)
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float32))


def test_none_keeps_the_middle_square_and_crop_pct_a_part_of_it() -> None:
    square, wide = Image.new("RGB", (32, 32), (255, 255, 255)), Image.new("RGB", (96, 32))
    middle = left_red_right_blue(16)
    square.paste(middle, (8, 8))
    wide.paste(square, (32, 0))
    whole = image_transform("none", 32, HALF, HALF, "nearest", 1.0)
    assert torch.equal(whole(wide), whole(square))
    half = image_transform("none", 16, HALF, HALF, "nearest", 0.5)
    assert torch.equal(half(square), image_transform("none", 16, HALF, HALF, "nearest", 1.0)(middle))


def flips_and_colors(augment: str, draws: int = 40) -> tuple[int, set[float]]:
    transform = image_transform(augment, 32, HALF, HALF, "nearest", 1.0)  # type: ignore[arg-type]
    flipped, brightest = 0, set()
    for seed in range(draws):
        with randomness(seed):
            out = transform(left_red_right_blue())
        red, blue = out[0].mean(dim=0), out[2].mean(dim=0)
        flipped += int(red[0] < red[-1] or blue[0] > blue[-1])
        brightest.add(round(float(out.max()), 3))
    return flipped, brightest


def test_light_neither_flips_nor_recolors_and_full_does_both() -> None:
    assert flips_and_colors("light") == (0, {1.0})
    flipped, brightest = flips_and_colors("full")
    assert 5 < flipped < 35
    assert len(brightest) > 5


def test_the_normalization_of_a_model_is_its_data_config() -> None:
    model = SimpleNamespace(data_config={"mean": [0.5, 0.5, 0.5], "std": (1, 1, 1), "input_size": (3, 8, 8)})
    assert model_normalization(model) == ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
    assert model_normalization(SimpleNamespace(data_config={"mean": HALF})) is None
    assert model_normalization(SimpleNamespace()) is None
    assert model_normalization(None) is None


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (HALF, None, "both or neither"),
        (None, HALF, "both or neither"),
        ((0.5, 0.5), HALF, "mean: .*three numbers"),
        (HALF, (0.5, 0.0, 0.5), "std: .*above 0"),
        (HALF, (0.5,), "std: .*three numbers"),
    ],
)
def test_mean_and_std_that_cannot_be_used_are_refused(mean: object, std: object, message: str) -> None:
    with pytest.raises(BadData, match=message):
        checked_normalization(mean, std)  # type: ignore[arg-type]
