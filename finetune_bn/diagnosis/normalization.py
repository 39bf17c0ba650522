"""By which mean and standard deviation images seem to have been normalized, and by which the weights want them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Triple = tuple[float, float, float]

# What is done to pixels from 0 to 1 (after `(pixel - mean) / std`), by its name.
KNOWN: dict[str, tuple[Triple, Triple]] = {
    "ImageNet's mean and std": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mean 0.5 and std 0.5": ((0.5,) * 3, (0.5,) * 3),
    "nothing, pixels from 0 to 1": ((0.0,) * 3, (1.0,) * 3),
    "nothing, pixels from 0 to 255": ((0.0,) * 3, (1 / 255,) * 3),
}
_ROUNDING = 0.02  # of a pixel's range: interpolation overshoots
_USED = 0.6  # share of a pixel's range that images use at least


@dataclass(frozen=True)
class Normalization:
    """What was found of the images.

    Attributes:
        done: what seems to have been done to them; None where nothing known explains their range.
        wanted: what the weights want, in words; None where the model does not say.
        fits: whether these agree; None where one of them is not known.
        shift: of the first layer, as the images are.
        shift_if_right: of the first layer, if they were normalized as wanted.
    """

    done: str | None
    wanted: str | None
    fits: bool | None
    shift: float | None = None
    shift_if_right: float | None = None


def look_at_inputs(model: nn.Module, images: Tensor, first_shift: Callable[[Tensor], float | None]) -> Normalization:
    """Tell how images were normalized, by the range of their pixels, and what that does to the first layer.

    Args:
        model: where a module of it has timm's `pretrained_cfg`, that says what its weights want.
        images: [N, 3, H, W].
        first_shift: passes images through the model and returns the shift of its first BatchNorm layer.
    """
    wanted = _wanted(model)
    words = None if wanted is None else _words(*wanted)
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        return Normalization(None, words, None)
    done = _done(images)
    if done is None or wanted is None:
        return Normalization(done, words, None)
    if _same(KNOWN[done], wanted):
        return Normalization(done, words, True)
    mean, std = (_column(values, images) for values in KNOWN[done])
    right_mean, right_std = (_column(values, images) for values in wanted)
    right = (images * std + mean - right_mean) / right_std
    return Normalization(done, words, False, first_shift(images), first_shift(right))


def _wanted(model: nn.Module) -> tuple[Triple, Triple] | None:
    for module in model.modules():
        config = getattr(module, "pretrained_cfg", None)
        mean, std = (config.get("mean"), config.get("std")) if isinstance(config, dict) else (None, None)
        if mean is not None and std is not None and len(mean) == len(std) == 3:
            return tuple(map(float, mean)), tuple(map(float, std))  # type: ignore[return-value]
    return None


def _done(images: Tensor) -> str | None:
    """Return what explains the range of the pixels, the known way by which they use most of it."""
    flat = images.detach().float().transpose(0, 1).flatten(1)
    low, high = flat.min(1).values.cpu(), flat.max(1).values.cpu()
    best: tuple[float, str] | None = None
    for name, (mean, std) in KNOWN.items():
        first = low * torch.tensor(std) + torch.tensor(mean)
        last = high * torch.tensor(std) + torch.tensor(mean)
        used = float((last - first).max())
        inside = float(first.min()) >= -_ROUNDING and float(last.max()) <= 1 + _ROUNDING
        if inside and used >= _USED and (best is None or used > best[0] + _ROUNDING):
            best = used, name
    return None if best is None else best[1]


def _same(one: tuple[Triple, Triple], other: tuple[Triple, Triple]) -> bool:
    return all(abs(a - b) < 0.01 for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def _words(mean: Triple, std: Triple) -> str:
    known = next((name for name, pair in KNOWN.items() if _same(pair, (mean, std))), None)
    return known or f"mean {mean} and std {std}"


def _column(values: Triple, like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype)[:, None, None]
