"""Images by number: where they come from, how one is read, and which of them cannot be read."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from finetune_bn.data.order import Draw, randomness
from finetune_bn.errors import BadData, complaint
from finetune_bn.utilities.images import as_rgb, unreadable

T = TypeVar("T")

UNREADABLE = unreadable()
# A pass over fewer images than this is over before a progress bar can be read.
BAR_FROM = 1000


class Batch(NamedTuple):
    """One batch; a tuple, so that `images, labels = batch` works in any LightningModule."""

    images: Tensor
    """float32 `[N, 3, H, W]`, normalized."""
    labels: Tensor
    """int64 `[N]`."""


class ImageSource(ABC):
    """All images of a data set, by number, with what is known of each without reading it.

    Attributes:
        labels: class number of each image.
        domains: name of the domain of each image.
        in_memory: whether reading an image touches no file.
    """

    labels: list[int]
    domains: list[str]
    in_memory: bool = False

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Return image `index` in any mode; raises one of `UNREADABLE` if it cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what the user knows image `index` by: a path, or a set with a number."""

    def load(self, indices: Sequence[int]) -> None:
        """Bring these images into memory, where the source works that way; called before workers start."""
        return

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        """Return image `index` as a decoded RGB image; raises `BadData` that names it if it cannot be read."""
        try:
            rgb: Image.Image = as_rgb(self.open(index))
            return rgb
        except UNREADABLE as error:
            allowed = "an image file that can be read whole"
            remedy = f"It failed with: {type(error).__name__}: {error}. "
            if isinstance(error, Image.DecompressionBombError):
                remedy += "Scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust where it is from. "
            remedy += "Replace or remove it, or set on_bad_image: skip to leave out and list all such images."
            raise BadData(complaint("image", self.name(index), allowed, remedy)) from error


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Some images of a source with the transform they go through: item `i` is `(image [3, H, W], label)`.

    Taken through a `Draw` (as `SeededOrder` gives them) an augmented image depends on nothing but that draw's seed:
    not on the number of workers, and not on what the model draws from the global generators.

    Args:
        source: where the images come from.
        indices: which of them, by their number in the source.
        transform: from an RGB image to a float tensor.
        augmented: whether the transform draws random numbers; if not, a draw's seed need not be set.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: Sequence[int],
        transform: Callable[[Image.Image], Tensor],
        augmented: bool = True,
    ) -> None:
        self.source = source
        self.indices = list(indices)
        self.transform = transform
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        index = self.indices[item]
        image = self.source.read(index)
        if self.augmented and isinstance(item, Draw):
            with randomness(item.seed):
                return self.transform(image), self.source.labels[index]
        return self.transform(image), self.source.labels[index]

    @property
    def labels(self) -> Tensor:
        """Class number of each item, int64 `[len(self)]`; what a P x K sampler needs."""
        return torch.tensor([self.source.labels[index] for index in self.indices], dtype=torch.int64)

    @property
    def domains(self) -> list[str]:
        """Domain of each item, by name."""
        return [self.source.domains[index] for index in self.indices]

    @property
    def names(self) -> list[str]:
        """What the user knows each item by; the order of predictions over an unshuffled loader."""
        return [self.source.name(index) for index in self.indices]


def collate(items: Sequence[tuple[Tensor, int]]) -> Batch:
    """Stack items of an `ImageSet` into a `Batch`."""
    images, labels = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels, dtype=torch.int64))


def cpu_count() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_unreadable(source: ImageSource, indices: Sequence[int]) -> dict[int, str]:
    """Decode every one of these images once and return `{index: reason}` of those that cannot be read."""

    def reason(index: int) -> str | None:
        try:
            source.read(index)
        except BadData as error:
            return f"{type(error.__cause__).__name__}: {error.__cause__}"
        return None

    with ThreadPoolExecutor(max_workers=min(8, cpu_count())) as pool:
        reasons = with_bar(pool.map(reason, indices), len(indices), "Looking for images that cannot be read")
        return {index: found for index, found in zip(indices, reasons, strict=True) if found is not None}


def with_bar(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Yield `items`, with a progress bar on the terminal if there are many."""
    if total < BAR_FROM:
        yield from items
        return
    from rich.progress import track

    yield from track(items, total=total, description=description, transient=True)
