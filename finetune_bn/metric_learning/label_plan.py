"""Which images make up the P x K batches of an epoch: labels as numbers, and one plan for all ranks.

Everything is done on whole tensors, so that ten million images in a million classes take seconds; and any batch can be
computed by itself, so that a resumed epoch need not be dealt again from its beginning.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from finetune_bn.errors import BadData, complaint

_NO_ORDER = (torch.uint16, torch.uint32, torch.uint64)  # torch does not sort them
_KEPT = 4096  # shuffles of labels that come round again, kept for the batches that follow


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels as numbers, int64 [N], counted in the order in which they first come, with their names."""

    numbers: Tensor
    names: list[Any]

    @classmethod
    def read(cls, labels: Any) -> Labels:
        """Read one label an image: integers, strings, or a one-dimensional tensor or array.

        Raises:
            BadData: it is anything else, empty, or holds NaN.
        """
        if isinstance(labels, Labels):
            return labels
        allowed = "one label an image: integers or strings, or a one-dimensional tensor or array"
        tensor = _as_tensor(labels)
        if tensor is not None:
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise BadData(complaint("labels", labels, allowed))
            return cls._of_tensor(tensor)
        try:
            values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
            known: dict[Any, int] = {}
            numbers = [known.setdefault(v.item() if hasattr(v, "item") else v, len(known)) for v in values]
            usable = not isinstance(labels, str) and len(known) > 0
        except (TypeError, ValueError, RuntimeError) as error:  # not iterable, not hashable, or of several numbers each
            raise BadData(complaint("labels", labels, allowed)) from error
        if not usable or any(name != name for name in known):
            raise BadData(complaint("labels", labels, allowed))
        return cls(torch.tensor(numbers, dtype=torch.int64), list(known))

    @classmethod
    def _of_tensor(cls, labels: Tensor) -> Labels:
        values, inverse = torch.unique(labels, return_inverse=True)
        first = torch.full((len(values),), len(labels)).scatter_reduce_(
            0, inverse, torch.arange(len(labels)), reduce="amin"
        )
        order = first.argsort()
        number = torch.empty_like(order)
        number[order] = torch.arange(len(order))
        return cls(number[inverse], values[order].tolist())

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def counts(self) -> Tensor:
        """How many images each label has, int64 [number of labels]."""
        return torch.bincount(self.numbers, minlength=len(self.names))

    @cached_property
    def digest(self) -> str:
        """A hash of labels and names."""
        numbers = self.numbers.contiguous()
        hashed = hashlib.sha256(ctypes.string_at(numbers.data_ptr(), numbers.numel() * numbers.element_size()))
        hashed.update(repr(self.names).encode())
        return hashed.hexdigest()[:16]


def _as_tensor(labels: Any) -> Tensor | None:
    """Return a one-dimensional tensor or array of numbers as a tensor in main memory; `None` for anything else."""
    if not isinstance(labels, Tensor):
        if not hasattr(labels, "__array__"):
            return None
        try:
            labels = torch.tensor(labels.__array__())
        except (TypeError, ValueError, RuntimeError):  # words, objects, the other order of bytes
            return None
    usable = labels.dim() == 1 and len(labels) > 0 and labels.dtype not in _NO_ORDER and not labels.is_complex()
    return labels.detach().cpu() if usable else None


class EpochPlan:
    """All batches of one epoch, for all ranks.

    The labels are dealt like decks of cards, one deck behind the other; where the labels of one step are of two decks,
    those that are in hand already wait until the next step. The images of a label stand in a random order that is gone
    through again and again, K at a time, and shuffled anew whenever a hand ends with its last image: a hand holds
    different images where there are K, and all images come equally often.

    Args:
        images: images sorted by label, int64 [N].
        starts: where each label's images begin there, int64 [number of labels + 1].
        size: P and K.
        steps: batches of a rank.
        world_size: number of ranks.
        seed: anything; by its `str` and nothing else all is decided.
    """

    def __init__(
        self, images: Tensor, starts: Tensor, size: tuple[int, int], steps: int, world_size: int, seed: object
    ) -> None:
        self._p, self._k = size
        self._steps, self._world, self._seed = steps, world_size, seed
        self._starts, self._counts = starts, starts.diff()
        labels = len(self._counts)
        together = world_size if self._p * world_size <= labels else 1
        self._sequence = _deal(labels, steps * world_size * self._p, self._p * together, _generator(seed, "labels"))
        self._images = images
        self._shuffled = _shuffle_within(images, self._counts, _generator(seed, "images"))
        self._again: dict[tuple[int, int], Tensor] = {}

    def batches(self, rank: int, start: int = 0) -> Iterator[Tensor]:
        """Yield the batches of a rank from number `start` on, image numbers int64 [P, K] each."""
        for step in range(start, self._steps):
            yield self.batch(step, rank)

    def batch(self, step: int, rank: int) -> Tensor:
        """Return one batch of a rank, image numbers int64 [P, K]."""
        begin = (step * self._world + rank) * self._p
        labels = self._sequence[begin : begin + self._p]
        # Each deck holds each label once, so the deck's number is how often the label came before.
        turns = torch.arange(begin, begin + self._p) // len(self._counts)
        counts = self._counts[labels]
        places = (turns * self._k)[:, None] + torch.arange(self._k)
        found = self._shuffled[self._starts[labels][:, None] + places % counts[:, None]]
        # Behind so many images the label's last one ends a hand, and its images are shuffled anew.
        rounds = places[:, 0] // torch.lcm(counts, torch.tensor(self._k))
        for row in rounds.nonzero().flatten().tolist():
            found[row] = self._later(int(labels[row]), int(rounds[row]))[places[row] % counts[row]]
        return found

    def _later(self, label: int, round_: int) -> Tensor:
        """Return the images of a label in the order of another round than the first."""
        key = (label, round_)
        if key not in self._again:
            if len(self._again) >= _KEPT:
                self._again.clear()
            images = self._images[int(self._starts[label]) : int(self._starts[label + 1])]
            order = torch.randperm(len(images), generator=_generator(self._seed, label, round_))
            self._again[key] = images[order]
        return self._again[key]


def _generator(*parts: object) -> torch.Generator:
    text = "/".join(str(part) for part in parts)
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


def _deal(cards: int, number: int, hand: int, generator: torch.Generator) -> Tensor:
    """Return so many cards, deck by deck, of which each `hand` in a row are different; int64."""
    decks = -(-number // cards)
    dealt = torch.cat([torch.randperm(cards, generator=generator) for _ in range(decks)])
    if cards % hand == 0:
        return dealt[:number]
    sequence: list[int] = dealt.tolist()
    for begin in range(cards, number, cards):
        in_hand = begin % hand
        if not in_hand:
            continue
        held, front = set(sequence[begin - in_hand : begin]), sequence[begin : begin + hand]
        added = [card for card in front if card not in held][: hand - in_hand]
        taken = set(added)
        sequence[begin : begin + hand] = added + [card for card in front if card not in taken]
    return torch.tensor(sequence[:number], dtype=torch.int64)


def _shuffle_within(images: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """Return images sorted by label in a random order within each label."""
    order = torch.randperm(len(images), generator=generator)
    label = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return images[order[label[order].argsort(stable=True)]]
