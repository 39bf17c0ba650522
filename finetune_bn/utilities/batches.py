"""Take batches of any form no faster than they are needed, cut and join them, and pass them to a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from finetune_bn.errors import BadData, FinetuneBNError, complaint

Forward = Callable[[nn.Module, Any], Any]
_USUAL_NAMES = ("image", "images", "img", "imgs", "pixel_values", "inputs", "input", "x", "data")


@dataclass(frozen=True)
class Chunk:
    """Images that go through the model together.

    Attributes:
        content: what is passed to the model: (args, kwargs), or a whole batch for a `forward` of the user's.
        batch: for each image, the number of the batch that it came in.
        position: for each image, its place in that batch.
    """

    content: Any
    batch: tuple[int, ...]
    position: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def shape_key(self) -> tuple[Any, ...] | None:
        """What must be equal in chunks that are joined; None where this one can be neither joined nor cut."""
        leaves, form = tree_flatten(self.content)
        if not all(torch.is_tensor(leaf) and leaf.dim() and len(leaf) == len(self) for leaf in leaves):
            return None
        return (str(form), *((leaf.shape[1:], leaf.dtype, leaf.device) for leaf in leaves))

    @property
    def values_of_an_image(self) -> int:
        """How many numbers an image is, as far as the first tensor of the content tells."""
        first = next(leaf for leaf in tree_leaves(self.content) if torch.is_tensor(leaf) and leaf.dim())
        return first.numel() // len(first)

    def __getitem__(self, part: slice | Sequence[int]) -> Chunk:
        if isinstance(part, slice):
            content = tree_map_only(Tensor, lambda t: t[part], self.content)
            return Chunk(content, self.batch[part], self.position[part])
        index = torch.as_tensor(part)
        content = tree_map_only(Tensor, lambda t: t[index.to(t.device)], self.content)
        return Chunk(content, tuple(self.batch[i] for i in part), tuple(self.position[i] for i in part))


def join(chunks: Sequence[Chunk]) -> Chunk:
    """Return one chunk of chunks with the same `shape_key`."""
    if len(chunks) == 1:
        return chunks[0]
    leaves = zip(*(tree_leaves(chunk.content) for chunk in chunks), strict=True)
    content = tree_unflatten([torch.cat(parts) for parts in leaves], tree_flatten(chunks[0].content)[1])
    return Chunk(content, sum((c.batch for c in chunks), ()), sum((c.position for c in chunks), ()))


def grouped(chunks: Iterable[Chunk], size: int) -> Iterator[list[Chunk]]:
    """Group small chunks to `size` images and cut large ones; those that cannot be joined stay alone, as they are."""
    waiting: list[Chunk] = []
    key: tuple[Any, ...] | None = None
    for chunk in chunks:
        this = chunk.shape_key
        if waiting and (this is None or this != key):
            yield waiting
            waiting = []
        key = this
        if this is None:
            yield [chunk]
            continue
        while len(chunk) + (held := sum(map(len, waiting))) >= size:
            yield [*waiting, chunk[: size - held]]
            waiting, chunk = [], chunk[size - held :]
        if len(chunk):
            waiting.append(chunk)
    if waiting:
        yield waiting


def recut(chunks: Iterable[Chunk], size: int) -> Iterator[Chunk]:
    """Join small chunks to chunks of `size` images and cut large ones; those that cannot be joined pass as they are."""
    return map(join, grouped(chunks, size))


class Feeder:
    """Knows how a batch becomes a call of the model.

    Args:
        model: the model that is called.
        forward: a function `(model, batch)` that passes a batch to the model; None takes a tensor as the input, the
            first element of a tuple or list, and of a dict the keys that `model.forward` takes.
        device: where batches are moved to; None: where the model's first parameter or buffer is.
    """

    def __init__(self, model: nn.Module, forward: Forward | None, device: torch.device | str | None) -> None:
        self.model = model
        self.forward = forward
        like = next((t for t in (*model.parameters(), *model.buffers())), torch.empty(0))
        self.device = like.device if device is None else torch.device(device)

    def chunk(self, batch: Any, number: int) -> Chunk:
        """Return a batch as a chunk, on the device.

        Raises:
            BadData: the batch holds no images, or nothing says which part of it the model takes.
        """
        content = batch if self.forward is not None else self._inputs(batch, number)
        tensors = [leaf for leaf in tree_leaves(content) if torch.is_tensor(leaf) and leaf.dim()]
        if not tensors or not len(tensors[0]):
            raise BadData(complaint(f"batches[{number}]", _kind(batch), "a batch with at least one image in a tensor"))
        content = tree_map_only(Tensor, lambda t: t.to(self.device, non_blocking=True), content)
        images = len(tensors[0])
        return Chunk(content, (number,) * images, tuple(range(images)))

    def __call__(self, chunk: Chunk) -> Any:
        """Pass a chunk through the model, and return what it returns."""
        if self.forward is not None:
            return self.forward(self.model, chunk.content)
        args, kwargs = chunk.content
        return self.model(*args, **kwargs)

    def _inputs(self, batch: Any, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(batch, (tuple, list)) and len(batch):
            batch = batch[0]
        if torch.is_tensor(batch):
            return (batch,), {}
        if isinstance(batch, Mapping):
            parameters = inspect.signature(self.model.forward).parameters.values()
            taken = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            known = {key: value for key, value in batch.items() if key in taken}
            if any(torch.is_tensor(value) for value in known.values()):
                return (), known
            usual = next((name for name in _USUAL_NAMES if torch.is_tensor(batch.get(name))), None)
            if usual is not None:
                return (batch[usual],), {}
        raise BadData(
            complaint(
                f"batches[{number}]",
                _kind(batch),
                "a tensor, a tuple that starts with one, or a dict whose keys model.forward takes",
                "Or pass forward=lambda model, batch: model(...).",
            )
        )


def check_batches(batches: object, argument: str = "batches") -> Iterable[Any]:
    """Return `batches` if it can be iterated over; a tensor is one batch.

    Raises:
        FinetuneBNError: it is no iterable, or a dict, which would be iterated over by its keys.
    """
    if torch.is_tensor(batches):
        return [batches]
    if isinstance(batches, (str, Mapping, nn.Module)) or not isinstance(batches, Iterable):
        raise FinetuneBNError(
            complaint(argument, _kind(batches), "a DataLoader, or a list of batches", "One batch: pass [batch].")
        )
    return batches


def _kind(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"dict with the keys {', '.join(map(str, batch))}"
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__} of {', '.join(type(part).__name__ for part in batch) or 'nothing'}"
    return f"tensor of shape {tuple(batch.shape)}" if torch.is_tensor(batch) else type(batch).__name__


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
