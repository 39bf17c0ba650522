"""Count, mean and sum of squared deviations (M2) per channel, and how they merge without losing digits.

Merging follows Chan, Golub and LeVeque 1983 ("Algorithms for computing the sample variance", eq. 2.1): the result does
not depend on how the data were cut, but for rounding. Sums of squares are never kept: E[x^2] - E[x]^2 cancels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune_bn.errors import FinetuneBNError, complaint

# Square of the ratio mean / standard deviation from which a float32 mean is off by 1e-5 standard deviations and more.
_LARGE_MEAN = 1e6
# The same for the kernel that takes moments image by image, whose variances lose more.
_LARGE_IMAGE_MEAN = 1e4
# What the other ways to measure cost a core at least, in values: so few are BatchNorm's own kernel's, which on CPU is
# not vectorized where channels lie apart. And positions of an image from which one row an image is the faster way.
_MANY_VALUES, _LONG_ROW = 1 << 16, 64
# Values that are worked on together so that they, and what is made of them, stay in a core's cache.
_BLOCK = 1 << 17


@dataclass(frozen=True)
class Moments:
    """What is known of some values of each channel.

    Attributes:
        count: number of values of a channel: images times positions.
        mean: [C], float64; float32 may do for what is still to be merged.
        m2: sum of squared deviations from `mean`, [C], likewise, never negative.
    """

    count: float
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
        if x.device.type == "cpu" and x.is_contiguous():
            return _of_columns(x)
        # The kernel that BatchNorm itself runs in training: two passes on CPU, Welford on CUDA.
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        moments = cls.of_statistics(mean, variance, x.numel() // x.shape[1])
        return moments if moments.mean_is_in_range() else _of_columns(x.contiguous())

    @classmethod
    def of_statistics(cls, mean: Tensor, var: Tensor, count: float) -> Moments:
        """Return the moments of `count` values with this mean and biased variance, [C] each."""
        return cls(float(count), mean.double(), var.double() * count)

    @classmethod
    def none(cls, channels: int, device: torch.device | str | None = None) -> Moments:
        """Return the moments of no values, the neutral element of `merge`."""
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(0.0, zeros, zeros.clone())

    def merge(self, other: Moments) -> Moments:
        """Return the moments of the values of both."""
        count = self.count + other.count
        share = other.count / count if count else 0.0
        delta = other.mean - self.mean
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + delta.square() * self.count * share)

    def var(self, correction: int = 0) -> Tensor:
        """Return the variance [C], float64: divided by `count` as BN normalizes, or by `count - 1` as BN stores it."""
        return self.m2 / (self.count - correction)

    def mean_is_in_range(self, largest: float = _LARGE_MEAN) -> bool:
        """Whether no channel's mean is so much larger than its standard deviation that float32 has lost digits.

        Args:
            largest: square of that ratio. NaN and infinite moments are never in range.
        """
        return float(torch.addcmul(self.m2, self.mean, self.mean, value=-self.count / largest).amin()) >= 0

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
        packed = self.pack()
        gathered = [torch.empty_like(packed) for _ in range(world)]
        torch.distributed.all_gather(gathered, packed, group)
        return merge_all(map(Moments.unpack, gathered))

    def pack(self) -> Tensor:
        """Return all numbers as one tensor [1 + 2 C], for sending between processes."""
        return torch.cat([self.mean.new_tensor([self.count]), self.mean, self.m2])

    @classmethod
    def unpack(cls, packed: Tensor) -> Moments:
        """Return the moments that `pack` packed."""
        mean, m2 = packed[1:].chunk(2)
        return cls(float(packed[0]), mean, m2)


@dataclass(frozen=True)
class ImageMoments:
    """Mean and variance over the positions of each image.

    Attributes:
        mean: mean of x - pivot, [N, C], float32 or higher.
        var: biased variance, [N, C], float32 or higher.
        pivot: a value near the mean of the channel, [C]; None stands for 0.
        positions: values of a channel in one image.
    """

    mean: Tensor
    var: Tensor
    pivot: Tensor | None
    positions: int

    @classmethod
    def of(cls, x: Tensor, pivot: Tensor | None = None) -> ImageMoments:
        """Return the moments of the images `x` [N, C, ...]; in float32 or higher, whatever the dtype of `x`.

        Args:
            x: the images.
            pivot: [C], taken from the values first: for means that are too large for their dtype.
        """
        images, channels = x.shape[:2]
        x = x.detach().reshape(images, channels, -1)
        wide, positions = accumulator(x), x.shape[2]
        pivot = None if pivot is None else pivot.to(wide)
        means, variances = x.new_empty((2, images, channels), dtype=wide)
        size = max(1, _BLOCK // (channels * positions)) if x.device.type == "cpu" else images
        for start in range(0, images, size):
            rows = x[start : start + size].to(wide)
            rows = rows if pivot is None else rows - pivot[:, None]
            part = means[start : start + size]
            if positions < _LONG_ROW:
                torch.mean(rows, 2, out=part)
                torch.mean((rows - part[:, :, None]).square_(), 2, out=variances[start : start + size])
                continue
            # GroupNorm's kernel with a group a channel: Welford's algorithm, vectorized along the row. Without eps it
            # divides by the standard deviation, and by 0 where all values are alike.
            shape = (len(rows), channels, positions, channels)
            _, mean, rstd = torch.native_group_norm(rows.contiguous(), None, None, *shape, 0.0)
            part.copy_(mean)
            torch.reciprocal(rstd.square_(), out=variances[start : start + size])
        return cls(means, variances, pivot, positions)

    def __getitem__(self, chosen: slice) -> ImageMoments:
        return ImageMoments(self.mean[chosen], self.var[chosen], self.pivot, self.positions)

    @property
    def absolute(self) -> Tensor:
        """Means of x, [N, C], float64."""
        mean = self.mean.double()
        return mean if self.pivot is None else mean + self.pivot

    def pooled(self) -> Moments:
        """Return the moments of all values of the images."""
        means, number = self.absolute, float(self.mean.shape[0] * self.positions)
        mean = means.mean(0)
        m2 = (means - mean).square().sum(0).add_(self.var.sum(0, dtype=torch.float64)).mul_(self.positions)
        return Moments(number, mean, m2)


def has_long_rows(x: Tensor) -> bool:
    """Whether `measure_images` is the fastest way to measure `x`: on a CPU, where an image has its values in rows."""
    return measures_faster(x) and x.numel() >= _LONG_ROW * x.shape[0] * x.shape[1]


def measures_faster(x: Tensor) -> bool:
    """Whether `Moments.of` and then normalizing is faster than BatchNorm's kernel, which does both."""
    return x.device.type == "cpu" and x.numel() >= _MANY_VALUES and x.is_contiguous()


def measure_images(x: Tensor) -> tuple[Moments, ImageMoments]:
    """Return the moments of `x` [N, C, ...] and what they are made of, one row an image."""
    images = ImageMoments.of(x)
    moments = images.pooled()
    if not moments.mean_is_in_range(_LARGE_IMAGE_MEAN):
        images = ImageMoments.of(x, x[0].reshape(x.shape[1], -1)[:, 0])
        moments = images.pooled()
    return moments, images


def _of_columns(x: Tensor) -> Moments:
    """Return the moments of `x` [N, C, ...], contiguous: over the images first, which is one long vector at a time.

    Two passes, and the second corrects the first (Chan, Golub and LeVeque 1983, eq. 1.7): what the mean has lost to
    rounding is the mean of the deviations from it.
    """
    images, channels = x.shape[:2]
    flat = x.reshape(images, -1)
    positions = flat.shape[1] // channels
    mean = flat.mean(0).view(channels, positions).mean(1)
    deviation = flat - mean.repeat_interleave(positions)
    rest = deviation.mean(0).view(channels, positions).mean(1, dtype=torch.float64)
    squares = deviation.square_().sum(0).view(channels, positions).sum(1, dtype=torch.float64)
    number = images * positions
    return Moments(float(number), mean + rest, (squares - number * rest.square()).clamp_min_(0))


def merge_all(parts: Iterable[Moments]) -> Moments:
    """Return the moments of all values of the parts, in one step: Chan's formula for many parts."""
    parts = list(parts)
    if not parts:
        raise FinetuneBNError(complaint("parts", [], "at least one"))
    means, m2 = (torch.stack([getattr(part, name) for part in parts]) for name in ("mean", "m2"))
    return merge_rows([part.count for part in parts], means, m2)


def merge_rows(counts: Sequence[float], means: Tensor, m2: Tensor) -> Moments:
    """Return the moments of all values of the parts, of which each has a row in `means` and `m2` [parts, C]."""
    count, numbers = float(sum(counts)), torch.tensor(counts, dtype=torch.float64, device=means.device)[:, None]
    anchor = means[next((i for i, number in enumerate(counts) if number), 0)].double()
    means = means.double() - anchor
    mean = (numbers * means).sum(0) / max(count, 1)
    between = (numbers * (means - mean).square()).sum(0)
    return Moments(count, anchor + mean, m2.sum(0, dtype=torch.float64) + between)


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype in which values of `x` are summed: float32, or float64 where `x` is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
