"""Count, mean and sum of squared deviations (M2) per channel, and how they merge without losing digits.

Merging follows Chan, Golub and LeVeque 1983 ("Algorithms for computing the sample variance", eq. 2.1): the result does
not depend on how the data were cut, but for rounding. Sums of squares are never kept: E[x^2] - E[x]^2 cancels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune_bn.errors import FinetuneBNError, complaint

# Square of the ratio mean / standard deviation from which a float32 mean is off by 1e-5 standard deviations and more.
_LARGE_MEAN = 1e6
# The same for deviations from a pivot, from which the variance that is the difference of two squares is off by 1e-5.
_LARGE_OFFSET = 100.0
# Values that are worked on together so that they stay in a core's cache, and how many an image must have in a row for
# sums over rows to be faster than BatchNorm's kernel, which on CPU is not vectorized for this layout.
_BLOCK, _LONG_ROW = 1 << 17, 32


@dataclass(frozen=True)
class Moments:
    """What is known of some values of each channel.

    Attributes:
        count: number of values of a channel (images times positions), float64 scalar; exact up to 2^53.
        mean: [C], float64.
        m2: sum of squared deviations from `mean`, [C], float64, never negative.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Return the moments of `x` [N, C, ...], over all dimensions but the second.

        In float32 or higher, whatever the dtype of `x`. A mean that is large against the standard deviation costs no
        digits: deviations are taken from the mean before they are squared, or from a value of the channel itself
        where the mean is too large for its dtype.

        Raises:
            FinetuneBNError: `x` has no channel dimension, or no values.
        """
        if x.dim() < 2 or not x.numel():
            raise FinetuneBNError(complaint("x", tuple(x.shape), "[N, C, ...] with at least one value a channel"))
        x = x.detach()
        if has_long_rows(x):
            return measure_images(x)[0]
        x = x.to(accumulator(x))
        number = x.numel() // x.shape[1]
        count = torch.tensor(float(number), dtype=torch.float64, device=x.device)
        # The kernel that BatchNorm itself runs in training: two passes on CPU, Welford on CUDA.
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        mean, variance = mean.double(), variance.double()
        if cls(count, mean, variance * count).mean_is_too_large():
            channels = x.transpose(0, 1).reshape(x.shape[1], -1)
            pivot = channels[:, :1]
            variance, mean = torch.var_mean(channels - pivot, dim=1, correction=0)
            mean, variance = pivot[:, 0].double() + mean.double(), variance.double()
        return cls(count, mean, variance * count)

    @classmethod
    def of_statistics(cls, mean: Tensor, var: Tensor, count: float) -> Moments:
        """Return the moments of `count` values with this mean and biased variance, [C] each."""
        number = torch.tensor(float(count), dtype=torch.float64, device=mean.device)
        return cls(number, mean.double(), var.double() * number)

    @classmethod
    def none(cls, channels: int, device: torch.device | str | None = None) -> Moments:
        """Return the moments of no values, the neutral element of `merge`."""
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(torch.zeros((), dtype=torch.float64, device=device), zeros, zeros.clone())

    def merge(self, other: Moments) -> Moments:
        """Return the moments of the values of both."""
        count = self.count + other.count
        share = torch.where(count > 0, other.count / count, torch.zeros_like(count))
        delta = other.mean - self.mean
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + delta.square() * self.count * share)

    def var(self, correction: int = 0) -> Tensor:
        """Return the variance [C], float64: divided by `count` as BN normalizes, or by `count - 1` as BN stores it."""
        return self.m2 / (self.count - correction)

    def mean_is_too_large(self) -> bool:
        """Whether the mean of a channel is so much larger than its standard deviation that float32 has lost digits."""
        return bool((self.mean.square() * self.count > _LARGE_MEAN * self.m2).any())

    @property
    def is_finite(self) -> bool:
        """Whether no value was NaN or infinite."""
        # What is not finite in a channel is not finite in the sum.
        return math.isfinite(float((self.mean + self.m2).sum()))

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Moments:
        """Return the moments of the values of all processes, the same numbers on each; ranks may have any count.

        Without a process group that is initialized, these moments themselves. A rank without data takes part with
        `none`. Gathered and merged in the order of the ranks, not summed: a sum would have to be centered anew.
        """
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return self
        world = torch.distributed.get_world_size(group)
        if world == 1:
            return self
        packed = torch.cat([self.count.reshape(1), self.mean, self.m2])
        gathered = [torch.empty_like(packed) for _ in range(world)]
        torch.distributed.all_gather(gathered, packed, group)
        channels = self.mean.numel()
        return merge_all(Moments(p[0], p[1 : 1 + channels], p[1 + channels :]) for p in gathered)


@dataclass(frozen=True)
class ImageMeans:
    """Means over the positions of each image: of the deviation from a pivot, and of its square.

    Attributes:
        first: means of x - pivot, [N, C], float32 or higher.
        second: means of (x - pivot)^2, [N, C], float64.
        pivot: a value near the mean of the channel, [C]; what lies far off costs `pooled` digits.
        positions: values of a channel in one image.
    """

    first: Tensor
    second: Tensor
    pivot: Tensor
    positions: int

    @classmethod
    def of(cls, x: Tensor, pivot: Tensor) -> ImageMeans:
        """Return the means of `x` [N, C, ...] about `pivot` [C]; in float32 or higher, whatever the dtype of `x`."""
        images, channels = x.shape[:2]
        rows, wide = x.reshape(images, channels, -1), accumulator(x)
        positions, pivot = rows.shape[2], pivot.to(wide)
        first, norm = rows.new_empty((2, images, channels), dtype=wide)
        size = max(1, _BLOCK // (channels * positions)) if x.device.type == "cpu" else images
        for number, block in zip(range(0, images, size), torch.split(rows, size), strict=True):
            deviation = block - pivot[:, None]
            torch.mean(deviation, 2, out=first[number : number + size])
            torch.linalg.vector_norm(deviation, dim=2, out=norm[number : number + size])
        return cls(first, norm.double().square_().div_(positions), pivot, positions)

    def __getitem__(self, chosen: Tensor) -> ImageMeans:
        return ImageMeans(self.first[chosen], self.second[chosen], self.pivot, self.positions)

    def pooled(self) -> Moments:
        """Return the moments of all values of the images."""
        number = float(self.first.shape[0] * self.positions)
        count = torch.tensor(number, dtype=torch.float64, device=self.pivot.device)
        offset = self.first.mean(0, dtype=torch.float64)
        m2 = self.second.mean(0).sub_(offset.square()).clamp_min_(0).mul_(number)
        return Moments(count, offset.add_(self.pivot), m2)


def has_long_rows(x: Tensor) -> bool:
    """Whether `measure_images` is faster than BatchNorm's kernel: on a CPU, where an image has its values in rows."""
    return x.device.type == "cpu" and x.is_contiguous() and x.numel() >= _LONG_ROW * x.shape[0] * x.shape[1] > 0


def measure_images(x: Tensor) -> tuple[Moments, ImageMeans]:
    """Return the moments of `x` [N, C, ...] and what they are made of, one row an image."""
    pivot = x[0].reshape(x.shape[1], -1).to(accumulator(x)).mean(1)
    images = ImageMeans.of(x, pivot)
    moments = images.pooled()
    if (((moments.mean - pivot).square() * moments.count) > _LARGE_OFFSET * moments.m2).any():
        images = ImageMeans.of(x, moments.mean)
        moments = images.pooled()
    return moments, images


def merge_all(parts: Iterable[Moments]) -> Moments:
    """Return the moments of all values of the parts, in one step: Chan's formula for many parts."""
    parts = list(parts)
    if not parts:
        raise FinetuneBNError(complaint("parts", [], "at least one"))
    counts, means = torch.stack([part.count for part in parts])[:, None], torch.stack([part.mean for part in parts])
    count = counts.sum(0)
    anchor = means[(counts[:, 0] > 0).long().argmax()]
    mean = anchor + (counts * (means - anchor)).sum(0) / count.clamp_min(1)
    m2 = torch.stack([part.m2 for part in parts]).sum(0) + (counts * (means - mean).square()).sum(0)
    return Moments(count[0], mean, m2)


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype in which values of `x` are summed: float32, or float64 where `x` is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
