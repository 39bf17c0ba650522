"""The order of images, of batches of P labels x K images, and of their augmentation, decided by the seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data.distributed import DistributedSampler

from finetune_bn.data.splits import derive_seed
from finetune_bn.metric_learning.pk_sampler import PKBatchSampler
from finetune_bn.metric_learning.resumable_loader import KeepsPlace, Place
from finetune_bn.utilities.checks import number


class Draw(int):
    """The number of an image together with the seed of its augmentation.

    It is an `int`, so that any data set, wrapper or batch sampler takes it for the plain number.
    """

    seed: int

    def __new__(cls, index: int, seed: int) -> Draw:
        """Return `index` with `seed` attached."""
        draw = super().__new__(cls, index)
        draw.seed = seed
        return draw

    def __reduce__(self) -> tuple[type[Draw], tuple[int, int]]:
        """Keep the seed when the number is sent to a worker process."""
        return Draw, (int(self), self.seed)


@contextmanager
def randomness(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators inside the block; they go on as before behind it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        # not torch.manual_seed: that would also reset the accelerator's generators, which are not restored here
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class SeededOrder(KeepsPlace, DistributedSampler[Any]):
    """Yields a `Draw` per image in an order that depends on `(seed, epoch)` only, cut for one rank.

    The epoch is set by Lightning through `set_epoch`, so a resumed run goes on with the order it would have had;
    in a plain loop it counts by itself, so that every pass differs. In a `ResumableDataLoader` a run goes on in the
    middle of an epoch, and hears of the epoch before workers begin. It is a `DistributedSampler` because Lightning
    leaves those alone, where it would wrap any other sampler and lose the epoch.

    Args:
        data: what is sampled; only its length is used.
        seed: another seed gives other orders and other augmentations.
        shuffle: whether the order is random; if not it is 0, 1, 2, ...
        rank: which process this is.
        world_size: number of processes.
        even: with several processes, repeat a few images so that all have equally many (training needs that).
            If not, the counts may differ by one and no image is repeated.
    """

    unit = "image"

    def __init__(
        self,
        data: Sized,
        *,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        even: bool = True,
    ) -> None:
        self.place = Place()
        seed = number("seed", seed, whole=True)
        rank, world_size = number("rank", rank, whole=True), number("world_size", world_size, whole=True)
        super().__init__(data, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.num_items = len(data)
        self._even = even

    @property
    def epoch(self) -> int:
        """Epoch of the pass to come."""
        return self.place.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.place = Place(epoch)

    def __iter__(self) -> Iterator[Draw]:
        """Yield this rank's draws of the current epoch, from the place that was loaded; the next pass is the next."""
        epoch, start = self.begin()
        return self._draws(epoch, start)

    def _draws(self, epoch: int, start: int) -> Iterator[Draw]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
            order = torch.randperm(self.num_items, generator=generator)
        else:
            order = torch.arange(self.num_items)
        if self._even and len(order):
            order = order[torch.arange(len(self) * self.num_replicas) % len(order)]
        for following, index in enumerate(order[self.rank :: self.num_replicas][start:].tolist(), start + 1):
            self.reached(epoch, following)
            yield Draw(index, derive_seed(self.seed, epoch, index))

    def __len__(self) -> int:
        """Return the number of images that this rank sees in an epoch."""
        extra = self.num_replicas - 1 if self._even else self.num_replicas - 1 - self.rank
        return (self.num_items + extra) // self.num_replicas

    def plan(self) -> dict[str, Any]:
        """Return what decides the order of all ranks, as plain data."""
        own = {"seed": self.seed, "shuffle": self.shuffle, "world_size": self.num_replicas, "even": self._even}
        return {**own, "images": self.num_items}


class SeededLabelBatches(PKBatchSampler):
    """Yields the batches of a `PKBatchSampler` as `Draw`s: an image that comes twice in a batch is augmented twice."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """Yield this rank's batches of an epoch from number `start` on, with a seed for the augmentation of each image.

        Args:
            epoch: which epoch.
            start: number of the first batch.
        """
        rank = self.rank
        for place, batch in enumerate(super().batches(epoch, start), start):
            yield [Draw(image, derive_seed(self.seed, epoch, rank, place, i)) for i, image in enumerate(batch)]
