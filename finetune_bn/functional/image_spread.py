"""How far statistics that were measured on a sample of images may be from those of the population.

The pixels of an image are not independent, images are: errors are estimated from what one image adds, per channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.functional.moments import ImageMoments

# Pairs of images that are looked up at a time: 16 MB of their numbers.
_PAIRS = 1 << 21


@dataclass(frozen=True)
class ImageSpread:
    """How images differ in their mean and in their second moment, per channel; merges like `Moments`.

    `a` is the mean over the positions of an image of x - pivot, `b` that of (x - pivot)^2.

    Attributes:
        count: number of images, float64 scalar.
        mean: means of a and b, [2, C], float64.
        co: sums over images of the products of the deviations (aa, bb, ab), [3, C], float64.
        pivot: a value near the mean of the channel, [C], float64.
    """

    count: Tensor
    mean: Tensor
    co: Tensor
    pivot: Tensor

    @classmethod
    def of(cls, x: Tensor, pivot: Tensor) -> ImageSpread:
        """Return the spread of the images in `x` [N, C, ...]; `pivot` [C] costs digits where it is far off the mean."""
        return cls.of_images([ImageMoments.of(x, pivot)])

    @classmethod
    def of_images(cls, parts: Sequence[ImageMoments]) -> ImageSpread:
        """Return the spread of the images of all parts, of which there is at least one."""
        means = torch.cat([part.absolute for part in parts])
        pivot = means[0].clone() if parts[0].pivot is None else parts[0].pivot.double()
        a = means - pivot
        ab = torch.stack([a, a.square() + torch.cat([part.var for part in parts])])
        center = ab.mean(1)
        da, db = ab - center[:, None]
        co = torch.stack([da.square().sum(0), db.square().sum(0), (da * db).sum(0)])
        count = torch.tensor(float(ab.shape[1]), dtype=torch.float64, device=ab.device)
        return cls(count, center, co, pivot)

    @classmethod
    def none(cls, channels: int, device: torch.device | str | None = None) -> ImageSpread:
        """Return the spread of no images, the neutral element of `merge`."""
        zeros = torch.zeros(6, channels, dtype=torch.float64, device=device)
        return cls(zeros.new_zeros(()), zeros[:2], zeros[2:5], zeros[5])

    def merge(self, other: ImageSpread) -> ImageSpread:
        """Return the spread of the images of both (Chan, Golub and LeVeque 1983, and its form for products)."""
        if not self.count:
            return other
        other = other.about(self.pivot)
        count = self.count + other.count
        share = other.count / count
        da, db = delta = other.mean - self.mean
        products = torch.stack([da * da, db * db, da * db])
        co = self.co + other.co + products * self.count * share
        return ImageSpread(count, self.mean + delta * share, co, self.pivot)

    def about(self, pivot: Tensor) -> ImageSpread:
        """Return the same spread with another pivot [C]."""
        d = self.pivot - pivot
        (a, b), (aa, bb, ab) = self.mean, self.co
        mean = torch.stack([a + d, b + 2 * d * a + d.square()])
        co = torch.stack([aa, bb + 4 * d * ab + 4 * d.square() * aa, ab + 2 * d * aa])
        return ImageSpread(self.count, mean, co, pivot)

    def pack(self) -> Tensor:
        """Return all numbers as one tensor [1 + 6 C], for sending between processes."""
        return torch.cat([self.count.reshape(1), self.mean.flatten(), self.co.flatten(), self.pivot])

    @classmethod
    def unpack(cls, packed: Tensor) -> ImageSpread:
        """Return the spread that `pack` packed."""
        rows = packed[1:].view(6, -1)
        return cls(packed[0], rows[:2], rows[2:5], rows[5])

    def variance_per_image(self, mean: Tensor, var: Tensor, eps: float = 0.0) -> Tensor | None:
        """Return by how much one image's contribution to a statistic varies, in units of that statistic, [2, C].

        Divided by n and rooted it is the standard error of n images: of the mean in units of sqrt(var + eps), by which
        BatchNorm divides, and of the variance relative to var + eps. So a channel that hardly varies, which eps keeps
        quiet in the network too, does not rule the error. None with fewer than two images; 0 for constant channels.

        Args:
            mean: mean of the channel over all images, [C].
            var: biased variance of the channel over all images, [C].
            eps: what the layer adds to the variance.
        """
        if self.count < 2:
            return None
        aa, bb, ab = self.co / (self.count - 1)
        d = mean.double() - self.pivot
        # What an image adds to the variance, about the mean and not the pivot, is b - 2 d a + const.
        of_var = (bb - 4 * d * ab + 4 * d.square() * aa).clamp_min(0)
        alive = var > torch.finfo(torch.float32).eps * mean.square()
        safe = torch.where(alive, var.double() + eps, 1.0)
        return torch.stack([aa / safe, of_var / safe.square()]) * alive


def standard_error(variance_per_image: Tensor, images: float) -> float:
    """Return the standard error of a layer's statistics, in units of the channels' own spread.

    The larger one of mean and log variance, each the root mean square over channels: unlike a percentile it does not
    grow with the noise of its own estimate.
    """
    return float((variance_per_image.mean(1).max() / max(images, 1.0)).sqrt())


def batch_membership_p_value(
    features: Tensor, batch: Sequence[int] | Tensor, permutations: int = 4999, seed: int = 0
) -> float:
    """Return how likely images drawn at random would differ this much between batches; small: not i.i.d.

    A permutation test, exact whatever the features are: the share of the variance that lies between batches, summed
    over standardized channels, against the same after shuffling which image came in which batch.

    Args:
        features: one row an image that does not depend on the other images, [n, C].
        batch: number of the batch that each image came in, n of them.
        permutations: shuffles; the smallest p-value is 1 / (permutations + 1).
        seed: seed of the shuffles; the global random state is not used.

    Raises:
        FinetuneBNError: fewer than two batches, or no batch with two images.
    """
    ids = torch.as_tensor(batch)
    _, ids, sizes = torch.unique(ids, return_inverse=True, return_counts=True)
    if len(sizes) < 2 or int(sizes.max()) < 2:
        raise FinetuneBNError(complaint("batch", sizes.tolist(), "images of two batches or more, two in one of them"))
    x = features.detach().double().cpu()
    x = x - x.mean(0)
    x = x / x.std(0).where(x.std(0) > 0, 1.0)
    similarity = (x @ x.T).float()
    generator = torch.Generator().manual_seed(seed)
    orders = torch.rand(permutations, len(ids), generator=generator).argsort(1)
    # Which images are in the first batch, in the second, ..., as they came and shuffled; so many pairs at a time.
    images = torch.cat([ids[None], ids[orders]]).argsort(dim=1, stable=True)
    between = torch.zeros(len(images))
    start = 0
    for size in sizes.tolist():
        rows = max(1, _PAIRS // size**2)
        for first in range(0, len(images), rows):
            member = images[first : first + rows, start : start + size]
            between[first : first + rows] += similarity[member[:, :, None], member[:, None, :]].sum((1, 2)) / size
        start += size
    tolerance = 1e-6 * between[0].abs()
    return float((between >= between[0] - tolerance).float().mean())
