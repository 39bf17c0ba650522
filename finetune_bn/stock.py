"""Batches as they come from a loader, taken no faster than they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

from finetune_bn.feeding import Chunk, Feeder


class Stock:
    """Takes batches from an iterable, up to a number of images.

    Args:
        batches: where they come from.
        feeder: makes chunks of them.
        limit: take so many images at most; None takes all.

    Attributes:
        images: images taken so far.
        exhausted: whether there are no more to take.
        expected: images that there will be in the end, as far as length of the loader and first batch tell; else 0.
    """

    def __init__(self, batches: Iterable[Any], feeder: Feeder, limit: int | None) -> None:
        self.images = 0
        self.exhausted = limit == 0
        self.expected = 0
        self._batches = batches
        self._iterator: Iterator[Any] | None = None
        self._feeder = feeder
        self._limit = limit
        self._rest: Chunk | None = None
        self._number = 0

    def up_to(self, images: float) -> Iterator[Chunk]:
        """Yield chunks until so many images were taken in all; a batch that holds more is cut where it can be."""
        wanted = images if self._limit is None else min(images, self._limit)
        while not self.exhausted and self.images < wanted:
            chunk = self._rest or self._next()
            self._rest = None
            if chunk is None:
                self.exhausted = True
                return
            room = wanted - self.images
            if len(chunk) > room and chunk.shape_key is not None:
                chunk, self._rest = chunk[: int(room)], chunk[int(room) :]
            self.images += len(chunk)
            yield chunk
        self.exhausted = self.exhausted or (self._limit is not None and self.images >= self._limit)

    def _next(self) -> Chunk | None:
        if self._iterator is None:
            self._iterator = iter(self._batches)
        try:
            batch = next(self._iterator)
        except StopIteration:
            return None
        chunk = self._feeder.chunk(batch, self._number)
        if not self._number:
            total = len(chunk) * _length(self._batches)
            self.expected = total if self._limit is None else min(total, self._limit)
        self._number += 1
        return chunk


def _length(batches: Iterable[Any]) -> int:
    """Return how many batches there are; 0 where that is not known, as in a DataLoader over an IterableDataset."""
    try:
        return len(batches) if isinstance(batches, Sized) else 0
    except (TypeError, NotImplementedError):
        return 0
