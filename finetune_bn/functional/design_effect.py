"""What a batch is worth whose images come in groups of one label: design effect and bias of the running variance.

Kish 1965, "Survey Sampling", chapter 5: images of one label resemble each other, so a batch of P labels with K images
each tells as much of the population's mean as N / DEFF images drawn one by one, N = P K,

    DEFF = 1 + (K - 1) rho,    rho = between-label share of the variance of per-image channel means.

BatchNorm stores variances about the batch's own mean, whose variance they miss, so with n = N HW values

    E[running_var] = n / (n - 1) (var - Var(batch mean)),    Var(batch mean) = DEFF var_of_image_means / N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune_bn.errors import FinetuneBNError, complaint


@dataclass(frozen=True)
class Components:
    """Where the variance of a channel's values comes from, [C] each; their sum is the variance.

    Attributes:
        label: of the labels' means about the mean of all.
        image: of the images' means about those of their labels.
        within: of the values of an image about its mean, divided by their number.
    """

    label: Tensor
    image: Tensor
    within: Tensor

    @classmethod
    def nested(cls, label: Tensor, image: Tensor, pixel: Tensor, positions: int) -> Components:
        """Return those of values that are the sum of a label's, an image's and a pixel's independent effect.

        Args:
            label: variance of the labels' effects, [C].
            image: variance of the images' effects, [C].
            pixel: variance of the effects of the `positions` pixels of an image, [C].
            positions: H times W.
        """
        return cls(label, image + pixel / positions, pixel * (1 - 1 / positions))

    @classmethod
    def estimate(cls, means: Tensor, within: Tensor, labels: Tensor) -> Components | None:
        """Return the unbiased estimate from the images of a batch; None where one cannot tell labels from images.

        Analysis of variance with groups of any size. No independence of pixels is assumed. An estimate may be
        negative: average over channels or batches before asking for a share.

        Args:
            means: means over the positions of each image, [N, C].
            within: variance of the values of an image about its mean, averaged over images, [C].
            labels: [N]; two of them or more, and two images of one of them.

        Raises:
            FinetuneBNError: not one label an image.
        """
        if means.dim() != 2 or labels.shape != means.shape[:1]:
            raise FinetuneBNError(complaint("labels", tuple(labels.shape), f"one an image: {tuple(means.shape[:1])}"))
        _, group, sizes = torch.unique(labels.to(means.device), return_inverse=True, return_counts=True)
        images, groups = len(group), len(sizes)
        if groups < 2 or groups == images:
            return None
        means = means.double() - means.double().mean(0)
        weights = sizes.double()[:, None]
        centers = means.new_zeros(groups, means.shape[1]).index_add_(0, group, means) / weights
        between = (weights * centers.square()).sum(0) / (groups - 1)
        image = (means - centers[group]).square().sum(0) / (images - groups)
        per_label = (images - float(weights.square().sum()) / images) / (groups - 1)
        return cls((between - image) / per_label, image, within.double())

    def blend(self, new: Components, share: float) -> Components:
        """Return the average of these and new ones, which count for `share` of it."""
        pairs = ((self.label, new.label), (self.image, new.image), (self.within, new.within))
        return Components(*(old + share * (one - old) for old, one in pairs))

    def among(self, diversity: float) -> Components:
        """Return those of a population of few labels, whose own means are a sample too; see `LabelCounts`."""
        return Components(self.label * diversity, self.image, self.within)

    @property
    def variance(self) -> Tensor:
        """Variance of the values."""
        return self.label + self.image + self.within

    @property
    def rho(self) -> Tensor:
        """Between-label share of the variance of per-image means: the intraclass correlation."""
        return self.label / (self.label + self.image)

    def variance_of_batch_mean(self, images: int, group_size: float) -> Tensor:
        """Return the variance of the mean of a batch, see `group_size` for what its labels have to do with it."""
        return (self.label * group_size + self.image) / images

    def expected_running_var(self, images: int, positions: int, group_size: float) -> Tensor:
        """Return where BatchNorm's running variance settles in batches of so many images."""
        values = images * positions
        return values / (values - 1) * (self.variance - self.variance_of_batch_mean(images, group_size))


def group_size(labels: Tensor) -> float:
    """Return the K of a batch whose labels may have unequal numbers of images: sum(n^2) / sum(n)."""
    sizes = torch.unique(labels, return_counts=True)[1].double()
    return float(sizes.square().sum() / sizes.sum())


def design_effect(rho: Tensor | float, group_size: float) -> Tensor | float:
    """Return DEFF = 1 + (K - 1) rho."""
    return 1 + (group_size - 1) * rho


class LabelCounts:
    """How many images of each label the batches of a training hold.

    One batch cannot tell whether its labels were drawn in groups, or whether there are just so few. Several can, by
    how much the share s_l of label l varies from batch to batch: what labels with effects c_l add to the variance of
    the batch mean is that of sum(s_l c_l), so for independent effects sum(Var(s_l)) times their variance.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._inverse_sizes = 0.0
        self._squares = 0.0
        self._shares: dict[int, float] = {}

    def add(self, labels: Tensor) -> None:
        """Count the labels of a batch, whole numbers [N]."""
        values, counts = torch.unique(labels, return_counts=True)
        for label, count in zip(values.tolist(), counts.tolist(), strict=True):
            self._shares[label] = self._shares.get(label, 0.0) + count / len(labels)
            self._squares += (count / len(labels)) ** 2
        self.batches += 1
        self._inverse_sizes += 1 / len(labels)

    @property
    def labels(self) -> int:
        """Number of different labels seen."""
        return len(self._shares)

    @property
    def diversity(self) -> float:
        """How often two images of different batches differ in their label: near 1 where there are many labels.

        The variance between labels in the population is so much of the variance of their effects.
        """
        return 1 - self._alike()

    @property
    def group_size(self) -> float | None:
        """The K that goes into DEFF: 1 for batches drawn at random, K for P x K batches out of many labels.

        K (C - P) / (C - 1) where the P labels are drawn out of C, so 0 where each batch holds all of them alike; the
        number of images where each batch holds one label. None with fewer than two batches, or a single label.
        """
        if self.batches < 2 or self.labels < 2 or self.diversity <= 0:
            return None
        spread = self._squares / self.batches - self._alike()
        images = self.batches / self._inverse_sizes  # harmonic mean: at random, a batch of n adds 1 / n to the spread
        return max(0.0, images * spread / self.diversity)

    def _alike(self) -> float:
        """Return sum(E[s_l]^2), from products of shares in different batches, so without bias."""
        if self.batches < 2:
            return 0.0
        products = sum(share * share for share in self._shares.values()) - self._squares
        return products / (self.batches * (self.batches - 1))
