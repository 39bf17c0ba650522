"""Take batches of any form no faster than they are needed, cut and join them, and pass them to a model."""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.utilities.batch_size import USUAL_NAMES, Count, count_images, count_in_call, is_list_of_images

Forward = Callable[[nn.Module, Any], Any]
Mask = Callable[[Any], Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Chunk:
    """Images that go through the model together.

    Attributes:
        content: what is passed to the model: (args, kwargs), or a whole batch for a `forward` of the user's.
        batch: for each image, the number of the batch that it came in.
        position: for each image, its place in that batch.
        mask: which values count, [N, positions...] each, for layers that see so many positions; none: all do.
        whole: whether it may be neither cut nor joined.
        counted: whether something told how many images it holds.
    """

    content: Any
    batch: tuple[int, ...]
    position: tuple[int, ...]
    mask: tuple[Tensor, ...] = ()
    whole: bool = False
    counted: bool = True

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def shape_key(self) -> tuple[Any, ...] | None:
        """What must be equal in chunks that are joined; None where this one can be neither joined nor cut."""
        leaves, form = tree_flatten((self.content, self.mask))
        if self.whole or not all(torch.is_tensor(leaf) and leaf.dim() and len(leaf) == len(self) for leaf in leaves):
            return None
        return (str(form), *((leaf.shape[1:], leaf.dtype, leaf.device) for leaf in leaves))

    @property
    def values_of_an_image(self) -> int:
        """How many numbers an image is, as far as the first tensor of the content tells."""
        leaves = (leaf for leaf in tree_leaves(self.content) if torch.is_tensor(leaf) and leaf.dim())
        first = next(leaves, None)
        return 1 if first is None else first.numel() // max(len(first), 1)

    def __getitem__(self, part: slice | Sequence[int]) -> Chunk:
        if isinstance(part, slice):
            content, mask = tree_map_only(Tensor, lambda t: t[part], (self.content, self.mask))
            return replace(self, content=content, mask=mask, batch=self.batch[part], position=self.position[part])
        index = torch.as_tensor(part)
        content, mask = tree_map_only(Tensor, lambda t: t[index.to(t.device)], (self.content, self.mask))
        batch, position = (tuple(numbers[i] for i in part) for numbers in (self.batch, self.position))
        return replace(self, content=content, mask=mask, batch=batch, position=position)


def join(chunks: Sequence[Chunk]) -> Chunk:
    """Return one chunk of chunks with the same `shape_key`."""
    if len(chunks) == 1:
        return chunks[0]
    first = chunks[0]
    leaves = zip(*(tree_leaves((chunk.content, chunk.mask)) for chunk in chunks), strict=True)
    form = tree_flatten((first.content, first.mask))[1]
    content, mask = tree_unflatten([torch.cat(parts) for parts in leaves], form)
    batch, position = sum((c.batch for c in chunks), ()), sum((c.position for c in chunks), ())
    return replace(first, content=content, mask=mask, batch=batch, position=position)


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
        keep: whether batches stay as they come.
        mask: a function that returns, for a batch, which values count.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward | None,
        device: torch.device | str | None,
        keep: bool = False,
        mask: Mask | None = None,
    ) -> None:
        for name, function, form in (("forward", forward, "(model, batch)"), ("mask", mask, "(batch)")):
            if function is not None and not callable(function):
                raise FinetuneBNError(complaint(name, function, f"a function {form}, or None"))
        self.model = model
        self.forward = forward
        self.keep = keep
        self.mask = mask
        like = next((t for t in (*model.parameters(), *model.buffers())), torch.empty(0))
        self.device = like.device if device is None else torch.device(device)
        self._takes_images = any(isinstance(m, (nn.Conv2d, nn.LazyConv2d)) for m in model.modules())
        self._sizes: dict[int, int] = {}

    def chunk(self, batch: Any, number: int) -> Chunk:
        """Return a batch as a chunk, on the device.

        Raises:
            BadData: the batch holds no images, or nothing says which part of it the model takes.
        """
        if self.forward is not None:
            content, count = batch, count_images(batch, takes_lists=self._takes_images)
            empty = not count.known and _is_plain(batch)
        else:
            content = self._inputs(batch, number)
            count = count_in_call(*content)
            empty = not count.known
        if empty or not count.images:
            raise BadData(
                complaint(f"batches[{number}]", kind_of(batch), "a batch with at least one image in a tensor")
            )
        content = tree_map(self._moved, content)
        self._sizes[number] = count.images
        chunk = Chunk(content, (number,) * count.images, tuple(range(count.images)), self._masks(batch, number, count))
        return replace(chunk, whole=self.keep or not count.first, counted=count.known)

    def __call__(self, chunk: Chunk) -> Any:
        """Pass a chunk through the model, and return what it returns.

        Raises:
            BadData: the model takes other arguments. What else it raises is passed on; with a note where the chunk is
                not a batch as it came, which may be the cause.
        """
        try:
            if self.forward is not None:
                return self.forward(self.model, chunk.content)
            args, kwargs = chunk.content
            return self.model(*args, **kwargs)
        except FinetuneBNError:
            raise
        except Exception as error:
            if self.forward is None and not _fits(self.model.forward, chunk.content):
                allowed = f"what {type(self.model).__name__}.forward takes"
                remedy = f"{error}. Pass forward=lambda model, batch: model(...), which calls it."
                raise BadData(complaint(f"batches[{chunk.batch[0]}]", "its first tensor", allowed, remedy)) from error
            if not self.came_so(chunk):
                given = f"{len(chunk)} images of batches {', '.join(map(str, sorted(set(chunk.batch))[:4]))}"
                error.add_note(
                    f"The model was given {given}, cut and joined. Where the first dimension is not images (clips x "
                    "frames, bags, time first), pass keep_batches=True."
                )
            raise

    @property
    def functions(self) -> tuple[Any, ...]:
        """What runs in a call besides the model."""
        return () if self.forward is None else (self.forward,)

    def came_so(self, chunk: Chunk) -> bool:
        """Whether a chunk is a batch as it came, neither cut nor joined."""
        numbers = set(chunk.batch)
        return len(numbers) == 1 and self._sizes.get(next(iter(numbers)), len(chunk)) == len(chunk)

    def _moved(self, leaf: Any) -> Any:
        if torch.is_tensor(leaf):
            return leaf.to(self.device, non_blocking=True)
        # Batches of graph libraries and packed sequences have a method of the same name.
        move = None if isinstance(leaf, (nn.Module, type)) else getattr(leaf, "to", None)
        return move(self.device) if callable(move) else leaf

    def _masks(self, batch: Any, number: int, count: Count) -> tuple[Tensor, ...]:
        if self.mask is None:
            return ()
        found = self.mask(batch)
        masks = tuple(found) if isinstance(found, (list, tuple)) else (found,)
        for mask in masks:
            if not torch.is_tensor(mask) or mask.dtype != torch.bool or mask.dim() < 2 or len(mask) != count.images:
                shown = f"{mask.dtype} {tuple(mask.shape)}" if torch.is_tensor(mask) else type(mask).__name__
                allowed = f"bool tensors [{count.images}, positions...], True for values that count"
                raise BadData(complaint(f"mask(batches[{number}])", shown, allowed))
        return tuple(mask.to(self.device, non_blocking=True) for mask in masks)

    def _inputs(self, batch: Any, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        images = self._takes_images and is_list_of_images(batch) and len(batch) > 1
        if isinstance(batch, (tuple, list)) and len(batch) and not images:
            batch = batch[0]
        if torch.is_tensor(batch):
            return (batch,), {}
        if isinstance(batch, Mapping):
            parameters = inspect.signature(self.model.forward).parameters.values()
            taken = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            known = {key: value for key, value in batch.items() if key in taken}
            if any(torch.is_tensor(value) for value in known.values()):
                return (), known
            usual = next((name for name in USUAL_NAMES if torch.is_tensor(batch.get(name))), None)
            if usual is not None:
                return (batch[usual],), {}
        raise BadData(
            complaint(
                f"batches[{number}]",
                kind_of(batch),
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
            complaint(argument, kind_of(batches), "a DataLoader, or a list of batches", "One batch: pass [batch].")
        )
    return batches


def _fits(function: Callable[..., Any], content: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    """Whether a function can be called with these arguments, as far as its signature tells."""
    try:
        inspect.signature(function).bind(*content[0], **content[1])
    except TypeError:
        return False
    except ValueError:  # it has no signature
        pass
    return True


def _is_plain(batch: Any) -> bool:
    """Whether a batch is made of torch's and Python's own types, in which images would have been found."""
    return all(leaf is None or isinstance(leaf, (Tensor, str, bytes, int, float)) for leaf in tree_leaves(batch))


def kind_of(batch: Any) -> str:
    """Return in words what a batch is."""
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
        self._ahead: deque[Chunk] = deque()
        self._number = 0

    def first(self, number: int) -> list[Chunk]:
        """Return the first chunks, uncut, before any was taken; they are taken later all the same."""
        while (
            not self.exhausted and len(self._ahead) < number and sum(map(len, self._ahead)) < (self._limit or math.inf)
        ):
            chunk = self._draw()
            if chunk is None:
                break
            self._ahead.append(chunk)
        return list(self._ahead)

    def keep_batches(self) -> None:
        """From now on, batches stay as they come; none was taken yet."""
        self._feeder.keep = True
        self._ahead = deque(replace(chunk, whole=True) for chunk in self._ahead)

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
        return self._ahead.popleft() if self._ahead else self._draw()

    def _draw(self) -> Chunk | None:
        if self._iterator is None:
            self._iterator = iter(self._batches)
        try:
            batch = next(self._iterator)
        except StopIteration:
            return None
        chunk = self._feeder.chunk(batch, self._number)
        if not self._number:
            total = len(chunk) * (known_length(self._batches) or 0)
            self.expected = total if self._limit is None else min(total, self._limit)
        self._number += 1
        return chunk


def known_length(items: object) -> int | None:
    """Return how many there are; None where that is not known, as in a DataLoader over an IterableDataset."""
    try:
        return len(items) if isinstance(items, Sized) else None
    except (TypeError, NotImplementedError):
        return None
