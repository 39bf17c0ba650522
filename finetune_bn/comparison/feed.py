"""The batches of a training by seed alone: the same, in the same order, however often they are asked for."""

from __future__ import annotations

import copy
import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.utilities.batches import check_batches, kind_of
from finetune_bn.utilities.randomness import RandomStates

MEMORY = 512 * 2**20  # bytes of batches that are kept rather than read again
EPOCHS_APART = 100_000  # numbers of epochs that a seed has for itself, for samplers that know epochs alone


@dataclass
class _Kept:
    """The first batches of an epoch; `all` of them, where the epoch was seen to its end."""

    batches: list[Any] = field(default_factory=list)
    all: bool = False


class Feed:
    """Batches that can be asked for again and again.

    What a loader draws (order, augmentation) is drawn from generators that are set by seed and epoch before each of its
    epochs and kept apart from those of the model, so that a network that draws more or fewer random numbers sees the
    same images. Batches that fit in `MEMORY` are kept; of each a copy is handed out, which a model may write to.

    Args:
        batches: a DataLoader, a list of batches, or any iterable that can be iterated over anew.
        argument: its name, for messages.
        prepare: what becomes of each batch: to the device, for example.

    Raises:
        FinetuneBNError: it can be iterated over once alone, or is no iterable.
    """

    def __init__(self, batches: Any, argument: str, prepare: Callable[[Any], Any] = lambda batch: batch) -> None:
        self.batches = check_batches(batches, argument)
        if isinstance(batches, Iterator):
            remedy = "It is used up by the first training: pass a DataLoader, or list(...) of it."
            raise FinetuneBNError(complaint(argument, kind_of(batches), "batches that can be taken anew", remedy))
        self.argument, self.prepare = argument, prepare
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._bytes = 0
        self._first = self._places()

    def take(self, seed: int, number: int) -> Iterator[Any]:
        """Yield so many batches of a seed, from its first, epoch after epoch."""
        done = epoch = 0
        while done < number:
            begun = done
            for batch in self.epoch(seed, epoch):
                yield batch
                done += 1
                if done == number:
                    return
            if done == begun:
                raise BadData(complaint(self.argument, "no batch", "one batch or more"))
            epoch += 1

    def epoch(self, seed: int, epoch: int) -> Iterator[Any]:
        """Yield the batches of an epoch of a seed."""
        kept = self._kept.setdefault((seed, epoch), _Kept())
        known = len(kept.batches)
        for i in range(known):
            yield self.prepare(tree_map_only(Tensor, Tensor.clone, kept.batches[i]))
        if kept.all:
            return
        number = 0
        for number, batch in enumerate(self._drawn(seed, epoch), 1):
            if number <= known:
                continue
            size = sum(t.numel() * t.element_size() for t in tree_leaves(batch) if isinstance(t, Tensor))
            if number == len(kept.batches) + 1 and self._bytes + size <= MEMORY:
                kept.batches.append(batch)
                self._bytes += size
                batch = tree_map_only(Tensor, Tensor.clone, batch)
            yield self.prepare(batch)
        kept.all = number == len(kept.batches)

    def _drawn(self, seed: int, epoch: int) -> Iterator[Any]:
        number = int(hashlib.sha256(f"{seed}/{epoch}".encode()).hexdigest()[:8], 16)
        of_model = RandomStates()
        try:
            _seed_all(number)
            for generator in _generators(self.batches):
                generator.manual_seed(number)
            for sampler in _samplers(self.batches):
                if callable(getattr(sampler, "set_epoch", None)):
                    sampler.set_epoch(seed * EPOCHS_APART + epoch)
            if getattr(self.batches, "persistent_workers", False):
                self.batches._iterator = None  # type: ignore[attr-defined]  # its workers have drawn already
            iterator = iter(self.batches)
            of_data = RandomStates()
        finally:
            of_model.restore()
        while True:
            of_model = RandomStates()
            of_data.restore()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                of_data = RandomStates()
                of_model.restore()
            yield batch

    def _places(self) -> list[Callable[[], None]]:
        """Return what puts generators and samplers of the loader back to where they are now."""
        undo: list[Callable[[], None]] = []
        for generator in _generators(self.batches):
            undo.append(_call(generator.set_state, generator.get_state()))
        for sampler in _samplers(self.batches):
            for name in ("place", "epoch"):
                if name in vars(sampler):
                    undo.append(_call(setattr, sampler, name, copy.copy(vars(sampler)[name])))
        return undo

    def leave(self) -> None:
        """Forget what is kept, and leave the loader as it was found."""
        self._kept.clear()
        self._bytes = 0
        for put_back in self._first:
            put_back()


def as_batches(data: Any, argument: str, batch_size: int | None, *, training: bool) -> Any:
    """Return batches of what a user passes: a pair of tensors is cut, a list of batches gets a seeded order.

    Args:
        data: a pair (inputs, targets) of tensors, a list of batches, a DataLoader, or another iterable of batches.
        argument: its name, for messages.
        batch_size: images of a batch, for a pair of tensors.
        training: whether the order is random, and a last batch that is not full left out where there is another.

    Raises:
        FinetuneBNError: a pair of tensors of different lengths, or one without a batch size.
    """
    pair = isinstance(data, tuple) and len(data) == 2 and all(isinstance(t, Tensor) and t.dim() for t in data)
    if pair:
        inputs, targets = data
        if len(inputs) != len(targets) or not len(inputs):
            given = f"{len(inputs)} inputs and {len(targets)} targets"
            raise BadData(complaint(argument, given, "as many targets as inputs, one or more"))
        if batch_size is None:
            raise FinetuneBNError(complaint("batch_size", None, f"a number, where {argument} is a pair of tensors"))
        images = TensorDataset(inputs, targets)
        size = batch_size if training else max(batch_size, 64)
        order = RandomSampler(images) if training else SequentialSampler(images)
        batches = BatchSampler(order, size, drop_last=training and len(inputs) >= size)
        return DataLoader(images, sampler=batches, batch_size=None)
    if isinstance(data, list) and training:
        return DataLoader(data, batch_size=None, shuffle=True, collate_fn=_as_it_is)  # type: ignore[arg-type]
    return data


def one_by_one(batches: Any, batch_size: int = 32) -> Any:
    """Return a loader of the same images in random order, the same at each pass; the batches where it cannot be had."""
    dataset = getattr(batches, "dataset", None)
    if not isinstance(batches, DataLoader) or not isinstance(dataset, Sized) or isinstance(dataset, IterableDataset):
        return batches
    if batches.batch_size is None and batches.collate_fn is _as_it_is:
        return dataset  # a list of batches
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    if isinstance(dataset, TensorDataset):
        groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        return DataLoader(dataset, sampler=groups, batch_size=None)
    options: dict[str, Any] = {"batch_size": batch_size, "collate_fn": batches.collate_fn}
    return DataLoader(batches.dataset, sampler=order, **options)


def count(batches: Iterable[Any], most: int) -> int:
    """Return how many batches an epoch has; `most` where there are more, or nobody knows."""
    try:
        return min(len(batches), most) if isinstance(batches, Sized) else most
    except TypeError:
        return most


def _as_it_is(batch: Any) -> Any:
    return batch


def _call(function: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
    def call() -> None:
        function(*arguments)

    return call


def _seed_all(number: int) -> None:
    random.seed(number)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(number)
    torch.default_generator.manual_seed(number)


def _samplers(loader: Any) -> Sequence[Any]:
    """Return the samplers of a loader, outermost first, each once."""
    found: list[Any] = []
    waiting = [getattr(loader, name, None) for name in ("batch_sampler", "sampler")]
    while waiting:
        sampler = waiting.pop(0)
        if sampler is None or any(sampler is other for other in found) or isinstance(sampler, (list, tuple, range)):
            continue
        found.append(sampler)
        waiting += [getattr(sampler, name, None) for name in ("batch_sampler", "sampler")]
    return found


def _generators(loader: Any) -> list[torch.Generator]:
    holders = [loader, *_samplers(loader)]
    named = [getattr(holder, "generator", None) for holder in holders]
    found: list[torch.Generator] = []
    for generator in named:
        if isinstance(generator, torch.Generator) and not any(generator is other for other in found):
            found.append(generator)
    return found
