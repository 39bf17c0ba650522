"""A BatchNorm layer that measures what arrives at it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from finetune_bn.functional.image_spread import ImageSpread
from finetune_bn.functional.moments import ImageMoments, Moments, accumulator, merge_all, merge_rows
from finetune_bn.layers.statistics import Statistics

# So many measurements of a layer are merged at once.
_MERGE_AT = 32


class MeasuredLayer:
    """A layer that measures, and what it has measured.

    What arrives waits and is merged many at once: one by one the small operations would take longer than the sums.

    Args:
        name: its first name in the model.
        module: the layer.
        before: its statistics when the measuring began.

    Attributes:
        not_finite: numbers of the batches with NaN or infinite values.
    """

    def __init__(self, name: str, module: nn.Module, before: Statistics) -> None:
        self.name = name
        self.module = module
        self.before = before
        self.forget()

    def forget(self) -> None:
        """Start anew."""
        channels, device = self.before.mean.numel(), self.before.mean.device
        self._known = (Moments.none(channels, device), ImageSpread.none(channels, device))
        self.not_finite: set[int] = set()
        self._waiting: list[Moments] = []
        self._counts: list[int] = []
        self._images: list[ImageMoments] = []
        self._rows = torch.zeros(2, _MERGE_AT, channels, dtype=self.before.mean.dtype, device=device)

    def suits_kernel(self, x: Tensor) -> bool:
        """Whether BatchNorm's kernel for training can run here; torch refuses to train with eps 0."""
        return self.before.eps > 0 and self._rows.dtype == accumulator(x)

    @property
    def next_row(self) -> tuple[Tensor, Tensor]:
        """Where the kernel for training is to write mean and unbiased variance, before `note_row`; 0 as yet."""
        mean, var = self._rows[:, len(self._counts)]
        return mean, var

    def note_row(self, count: int, images: Sequence[ImageMoments]) -> None:
        """Add what was written to `next_row`: statistics of so many values a channel; and as in `note` the images."""
        self._counts.append(count)
        self._images += images
        if len(self._counts) == _MERGE_AT:
            self._merge()

    def note(self, moments: Moments, images: Sequence[ImageMoments] = (), not_finite: Iterable[int] = ()) -> None:
        """Add what arrived, the images among it that tell how images differ, and which batches are not finite."""
        self._waiting.append(moments)
        self._images += images
        self.not_finite.update(not_finite)
        if len(self._waiting) == _MERGE_AT:
            self._merge()

    @property
    def moments(self) -> Moments:
        """The moments of everything that arrived."""
        self._merge()
        return self._known[0]

    @property
    def spread(self) -> ImageSpread:
        """How images differ."""
        self._merge()
        return self._known[1]

    def _merge(self) -> None:
        moments, spread = self._known
        parts = self._waiting
        if counts := self._counts:
            means, variances = self._rows[:, : len(counts)]
            degrees = torch.tensor(counts, device=means.device)[:, None] - 1
            parts = [*parts, merge_rows(counts, means, variances * degrees)]
            self._rows.zero_()
        if parts:
            moments = merge_all([moments, *parts])
        if self._images:
            spread = spread.merge(ImageSpread.of_images(self._images))
        self._known = moments, spread
        self._waiting, self._counts, self._images = [], [], []

    def snapshot(self) -> Callable[[], None]:
        """Return what brings back the state of now."""
        self._merge()
        known, not_finite = self._known, set(self.not_finite)

        def restore() -> None:
            self.forget()
            self._known, self.not_finite = known, not_finite

        return restore
