"""Batches of P labels x K images whose augmentation is decided by the seed, as that of `SeededOrder` is."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_bn.data.order import Draw
from finetune_bn.data.splits import derive_seed
from finetune_bn.samplers import PKBatchSampler


class SeededLabelBatches(PKBatchSampler):
    """Yields the batches of a `PKBatchSampler` as `Draw`s: an image that comes twice in a batch is augmented twice."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """Yield this rank's batches of an epoch from number `start` on, with a seed for the augmentation of each image.

        Args:
            epoch: which epoch.
            start: number of the first batch.
        """
        rank = self.rank
        for number, batch in enumerate(super().batches(epoch, start), start):
            yield [Draw(image, derive_seed(self.seed, epoch, rank, number, i)) for i, image in enumerate(batch)]
