"""The tensor maths that turns a BatchNorm (BN) into a GroupNorm (GN) which computes nearly the same.

GN normalizes each image by mean and variance of groups of its own channels; BN in eval mode computes
`x * scale + shift` whatever the image (`functional.scale_shift`). All in float32 or higher, results too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune_bn.functional.frozen import at_least_float32
from finetune_bn.functional.moments import accumulator

# Values that are worked on together.
_BLOCK = 1 << 17


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return GroupNorm of `x` [N, C, ...] in the dtype and memory format of `x`, also under autocast.

    Where x and the parameters differ in dtype, it is computed in the wider one and cast once.

    Raises:
        ValueError: a group has a single value in an image, of which GroupNorm leaves nothing: it would return `bias`.
    """
    if x.numel() == x.shape[0] * groups:
        raise ValueError(
            f"an input of shape {list(x.shape)} has a single value in each of {groups} groups, and GroupNorm would "
            "return zero for it: use fewer groups here, or keep this layer a BatchNorm or frozen"
        )
    wide = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    return F.group_norm(x.to(wide), groups, weight, bias, eps).to(x.dtype)


def group_statistics(mean: Tensor, var: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the group that each channel is in, [C] each, from those of the channels.

    Law of total variance: the mean of the channels' variances and the variance of their means.
    """
    means, variances = (at_least_float32(t).reshape(groups, -1) for t in (mean, var))
    group_mean = means.mean(1, keepdim=True)
    group_var = variances.mean(1, keepdim=True) + (means - group_mean).square().mean(1, keepdim=True)
    return tuple(t.expand_as(means).reshape(-1) for t in (group_mean, group_var))  # type: ignore[return-value]


def contrast_kept(variance: float, eps: float) -> float:
    """Return the share of an image's contrast that a GN lets pass: `eps / (variance + eps)`, from 0 to 1.

    An image whose group has the variance v comes out with the standard deviation `sqrt(v / (v + eps))`. Where its
    contrast grows by a factor near 1, the output grows by that factor to the power of this share: not at all at 0, as
    with a small eps, and as much as the image does at 1, where nothing is normalized and only the mean is subtracted.
    """
    return eps / (variance + eps)


def closed_form(
    scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the (weight, bias) of the GN that stands for `x * scale + shift`, without any data.

    GN of an image whose groups have the statistics that the running ones predict computes exactly that; what differs
    is how far an image is from them.

    Args:
        scale: gamma', [C].
        shift: beta', [C].
        mean: running mean, [C].
        var: running variance, [C].
        groups: number of groups, a divisor of C.
        eps: that of the GN.
    """
    group_mean, group_var = group_statistics(mean, var, groups)
    return scale * torch.sqrt(group_var + eps), shift + scale * group_mean


@dataclass(frozen=True)
class ImagePairs:
    """What GN with any number of groups has to do with the output of a BN, of some images.

    Means over the positions of each image, [N, C] each, float64: of x and y about pivots near their means, of their
    squares and of their product.
    """

    x: Tensor
    xx: Tensor
    y: Tensor
    yy: Tensor
    xy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, x_pivot: Tensor, y_pivot: Tensor) -> ImagePairs:
        """Return the means of GN's input `x` and BN's output `y`, [N, C, ...] each, about pivots [C].

        What lies far off the pivots costs digits: the BN's running mean and bias are good ones.
        """
        # So few images at a time that what is computed on the way stays in a core's cache.
        size = max(1, _BLOCK * x.shape[0] // x.numel()) if x.device.type == "cpu" else x.shape[0]
        parts = [
            cls._of(*each, x_pivot, y_pivot) for each in zip(torch.split(x, size), torch.split(y, size), strict=True)
        ]
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("x", "xx", "y", "yy", "xy")))

    @classmethod
    def _of(cls, x: Tensor, y: Tensor, x_pivot: Tensor, y_pivot: Tensor) -> ImagePairs:
        channels = [1, -1] + [1] * (x.dim() - 2)
        dx, dy = (t.to(accumulator(t)) - p.to(accumulator(t)).view(channels) for t, p in ((x, x_pivot), (y, y_pivot)))
        others = list(range(2, x.dim()))

        def means(values: Tensor) -> Tensor:
            return (values.mean(others) if others else values).double()

        return cls(means(dx), means(dx * dx), means(dy), means(dy * dy), means(dx * dy))

    def scaled(self, factors: Tensor) -> ImagePairs:
        """Return the means with the channels of `x` multiplied by factors [C]; its pivot is to be, too."""
        f = factors.double()
        return ImagePairs(self.x * f, self.xx * f.square(), self.y, self.yy, self.xy * f)

    def sums(self, x_pivot: Tensor, groups: int, eps: float) -> Tensor:
        """Return what `GroupMoments.of_sums` needs, summed over the images: [6, C], float64; sums of parts add up.

        With z the output of a GN without weight and bias: the sums over images of 1, z, z^2, y, y^2 and z y.
        """
        pivot = x_pivot.double()
        images, channels = self.x.shape
        mean = (self.x + pivot).reshape(images, groups, -1)
        var = (self.xx - self.x.square()).reshape(images, groups, -1)
        center = mean.mean(2, keepdim=True)
        inner = var.mean(2, keepdim=True) + (mean - center).square().mean(2, keepdim=True)
        # z = (x - pivot + offset) * rate, with one offset a channel and one rate a group of each image.
        rate = torch.rsqrt(inner + eps).expand_as(mean).reshape(images, channels)
        offset = pivot - center.expand_as(mean).reshape(images, channels)
        z = (self.x + offset) * rate
        zz = (self.xx + 2 * offset * self.x + offset.square()) * rate.square()
        zy = (self.xy + offset * self.y) * rate
        return torch.stack([torch.ones_like(z), z, zz, self.y, self.yy, zy]).sum(1)


@dataclass(frozen=True)
class GroupMoments:
    """Means, variances and covariance of z (GN without weight and bias) and y (BN's output), [C] each, float64."""

    z_mean: Tensor
    z_var: Tensor
    y_mean: Tensor
    y_var: Tensor
    covariance: Tensor

    @classmethod
    def of_sums(cls, sums: Tensor, y_pivot: Tensor) -> GroupMoments:
        """Return the moments from the sums of `ImagePairs.sums`."""
        z, zz, y, yy, zy = sums[1:] / sums[0]
        z_var, y_var = ((second - first.square()).clamp_min(0) for first, second in ((z, zz), (y, yy)))
        return cls(z, z_var, y + y_pivot.double(), y_var, zy - z * y)

    def match(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (weight, bias) with which GN's output has BN's mean, and nearly BN's variance.

        Matching variances, `sign sd(y) / sd(z)`, keeps the scale that later layers expect; least squares, the same
        times the correlation r, has the smallest error. This takes the middle, times sqrt(r): noise that is not BN's
        output is damped, and the scale is not lost over the layers.

        Args:
            weight: the weight in use: its sign is kept, and its value where z is constant and tells nothing.
        """
        spread = self.z_var.clamp_min(torch.finfo(torch.float64).tiny)
        agreement = torch.sign(weight) * self.covariance / torch.sqrt(spread * self.y_var).clamp_min(1e-300)
        gamma = torch.sign(weight) * torch.sqrt(self.y_var / spread * agreement.clamp(0, 1))
        gamma = torch.where(self.z_var > 1e-12, gamma, weight.double())
        return gamma, self.y_mean - gamma * self.z_mean

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Return the root mean square of GN's output minus BN's, relative to BN's standard deviation.

        Over channels squares are summed before they are divided; 1 is the error of a constant. 0 for a BN that
        returns a constant.
        """
        gamma, offset = weight.double(), weight.double() * self.z_mean + bias.double() - self.y_mean
        square = gamma.square() * self.z_var - 2 * gamma * self.covariance + self.y_var + offset.square()
        total = self.y_var.sum()
        return float((square.clamp_min(0).sum() / total).sqrt()) if total > 0 else 0.0
