"""From an image to a normalized tensor: timm's transforms in three strengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from PIL import Image
from torch import Tensor

from finetune_bn.errors import BadData, complaint

Augment = Literal["none", "light", "full"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Triple = tuple[float, float, float]

AUGMENTS: tuple[Augment, ...] = ("none", "light", "full")
INTERPOLATIONS: tuple[Interpolation, ...] = ("nearest", "bilinear", "bicubic", "lanczos")
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


def image_transform(
    augment: Augment, image_size: int, mean: Sequence[float], std: Sequence[float], interpolation: str, crop_pct: float
) -> Callable[[Image.Image], Tensor]:
    """Return timm's transform from an RGB image to a float32 tensor `[3, image_size, image_size]`.

    - `none`: the short side is resized to `image_size / crop_pct`, the middle square is kept.
    - `light`: a random crop of 70 to 100 % of the area with an aspect ratio of 0.9 to 1.1, resized; no flip and no
      change of color, since both change what an emoji, a digit or a traffic sign means.
    - `full`: timm's default for training on photos: a random crop of 8 to 100 % of the area with an aspect ratio of
      3/4 to 4/3, a horizontal flip half of the time, and brightness, contrast and saturation changed by up to 40 %.
    """
    from timm.data.transforms_factory import create_transform

    common: dict[str, Any] = {
        "input_size": image_size,
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": interpolation,
    }
    if augment == "none":
        transform = create_transform(**common, is_training=False, crop_pct=crop_pct)
    elif augment == "light":
        gentle: dict[str, Any] = {"scale": (0.7, 1.0), "ratio": (0.9, 1 / 0.9), "hflip": 0.0, "color_jitter": None}
        transform = create_transform(**common, **gentle, is_training=True)
    else:
        transform = create_transform(**common, is_training=True)
    return cast("Callable[[Image.Image], Tensor]", transform)


def model_normalization(model: object) -> tuple[Triple, Triple] | None:
    """Return `(mean, std)` of a model's `data_config`, or `None` if it has no such dict."""
    config = getattr(model, "data_config", None)
    if not isinstance(config, dict) or "mean" not in config or "std" not in config:
        return None
    return checked_normalization(config["mean"], config["std"])


def checked_normalization(mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[Triple, Triple] | None:
    """Return `(mean, std)` as float triples, `None` if neither is given; raises `BadData` if they cannot be used."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        remedy = "One without the other would mix the numbers of two data sets."
        raise BadData(complaint("mean, std", (mean, std), "both or neither", remedy))
    return _triple("mean", mean, float("-inf"), ""), _triple("std", std, 0.0, ", above 0")


def _triple(argument: str, values: Sequence[float], above: float, also: str) -> Triple:
    if len(values) != 3 or min(values) <= above:
        raise BadData(complaint(argument, values, f"three numbers, one per color channel{also}"))
    red, green, blue = values
    return float(red), float(green), float(blue)
