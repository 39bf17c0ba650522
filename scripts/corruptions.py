"""Five corruptions at five severities, as pure functions of images in [0, 1].

`corrupt(images, kind, severity, indices)` gives every image what its own index decides, whatever images are beside it.
The kinds and, by severity, their one number:

| kind | formula | number |
|---|---|---|
| noise | clip(x + s z), z standard normal, drawn from the image's index, the same at every severity | s: 0.08 to 0.38 |
| blur | Gaussian kernel of sd s pixels, cut at 3 s, image mirrored at its border | s: 0.5 to 3 |
| contrast | m + s (x - m), m the mean of each color of the image | s: 0.4 to 0.05 |
| inversion | 1 - x where x >= s, else x (solarization); at severity 5 the negative | s: 0.8 to 0 |
| color | red x 1, green x (1 - s / 2), blue x (1 - s): light that is too warm | s: 0.2 to 1 |

Noise and contrast have the numbers of ImageNet-C (Hendrycks and Dietterich 2019); the others are made for 64 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = {
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "blur": (0.5, 1.0, 1.5, 2.0, 3.0),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "inversion": (0.8, 0.6, 0.4, 0.2, 0.0),
    "color": (0.2, 0.4, 0.6, 0.8, 1.0),
}
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(images: Tensor, kind: str, severity: int, indices: Sequence[int]) -> Tensor:
    """Return corrupted images, in [0, 1] too.

    Args:
        images: [N, 3, H, W] in [0, 1].
        kind: a key of `STRENGTHS`.
        severity: 1 to 5.
        indices: one number per image; what is random depends on it alone.

    Raises:
        ValueError: the kind, the severity or the images are none of these.
    """
    if kind not in STRENGTHS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(STRENGTHS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity is {severity!r}; it must be a whole number from 1 to 5")
    if images.dim() != 4 or images.shape[1] != 3 or len(images) != len(indices):
        raise ValueError(
            f"images are {list(images.shape)} with {len(indices)} indices; they must be [N, 3, H, W] and N"
        )
    if len(images) and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError("images must lie in [0, 1]: corrupt them before they are normalized")
    strength = STRENGTHS[kind][severity - 1]
    if kind == "noise":
        return add_noise(images, strength, indices)
    return {"blur": blur, "contrast": lower_contrast, "inversion": solarize, "color": warm}[kind](images, strength)


def add_noise(images: Tensor, sd: float, indices: Sequence[int]) -> Tensor:
    """Add Gaussian noise, for each image from a generator of its own."""
    noise = [torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(index)) for index in indices]
    return (images + sd * torch.stack(noise).to(images)).clamp(0, 1) if noise else images.clone()


def blur(images: Tensor, sd: float) -> Tensor:
    """Convolve with a Gaussian, rows and columns in turn."""
    radius = math.ceil(3 * sd)
    at = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (at / sd) ** 2)
    kernel = (kernel / kernel.sum()).to(images).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    rows = F.conv2d(F.pad(images, (radius, radius, 0, 0), mode="reflect"), kernel, groups=3)
    both = F.conv2d(F.pad(rows, (0, 0, radius, radius), mode="reflect"), kernel.transpose(2, 3), groups=3)
    return both.clamp(0, 1)  # a kernel sums to 1 only up to rounding


def lower_contrast(images: Tensor, factor: float) -> Tensor:
    """Move each color towards its mean in the image."""
    return torch.lerp(images.mean((2, 3), keepdim=True), images, factor)


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert the values from the threshold up."""
    return torch.where(images >= threshold, 1 - images, images)


def warm(images: Tensor, strength: float) -> Tensor:
    """Take away half the strength's share of green, and all of it of blue."""
    return images * torch.tensor([1.0, 1.0 - strength / 2, 1.0 - strength]).to(images).view(1, 3, 1, 1)
