"""Batches of exactly P labels x K images on every rank, from one seeded plan, and a loader that keeps its place in it.

An image is known by its position in the data set, a label by whatever the data set calls it.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.utilities.checks import choice, number

Short = Literal["repeat", "drop", "error"]
SHORT: tuple[Short, ...] = get_args(Short)
Order = Literal["grouped", "interleaved"]
ORDERS: tuple[Order, ...] = get_args(Order)
NAMES_SHOWN = 5


@dataclass
class _Place:
    """The pass to come begins at `batch` of `epoch`; `drawn` tells the epoch and the batches of the last one."""

    epoch: int = 0
    batch: int = 0
    drawn: tuple[int, int] | None = None


class PKBatchSampler(BatchSampler):
    """Yields batches of exactly P labels x K images, as positions in the data set: `DataLoader(batch_sampler=...)`.

    **Plan.** `(seed, epoch)` decide all batches of all ranks of an epoch. The labels are dealt like a deck of cards,
    shuffled anew when it is used up, and so are the images of each label: in an epoch every label comes equally often,
    give or take one, and so does every image of a label. Labels of many images do not come more often than others.

    **Ranks.** Each rank yields its own batches of the plan, as many as the others. What the ranks draw in one step
    shares no label where there are P x world_size labels, and then no image either. Rank and world size are those of
    `torch.distributed` when iteration starts, where they are not given. Lightning rebuilds batch samplers over ranks;
    this one comes out of that whole, with `use_distributed_sampler` true or false.

    **Order in a batch.** `grouped`: the K images of a label stand together, so the i-th of the ghost groups `x[i::K]`
    holds one image of every label. `interleaved`: all labels once, K times over, so each of the chunks `x.chunk(K)`
    holds one image of every label.

    **Resume.** `state_dict` names the next batch. It counts what was drawn, and the workers of a `DataLoader` draw
    ahead: `ResumableDataLoader` counts what was handed out. In a plain loop every pass is another epoch; `set_epoch`
    chooses one.

    Attributes:
        num_images: number of images that can be drawn.
        short_labels: labels of fewer than K images, with the number of their images.

    Args:
        labels: one label an image, in the order of the data set: integers, strings, or a one-dimensional tensor or
            array.
        num_labels: P, the labels of a batch.
        images_per_label: K, the images of each label in a batch.
        short: what happens to labels of fewer than K images. repeat: their images come more than once in a batch.
            drop: they are left out. error: refuse. The first two warn, and list them in `short_labels`.
        num_batches: batches of an epoch on each rank. Default: as many as the images fill, all ranks together, without
            coming twice on average: `num_images // (P * K * world_size)`, at least 1.
        order: grouped or interleaved, see above.
        seed: another seed gives another plan.
        rank: which process this is; default that of `torch.distributed`.
        world_size: number of processes; default that of `torch.distributed`.
        sampler: not for users: where Lightning and Fabric put a `DistributedSampler` in, whose rank and number of
            replicas are then those of this sampler, if no others were given.

    Raises:
        FinetuneBNError: an argument is none of the allowed ones.
        BadData: there are no labels, fewer than P of them, or, with `short="error"`, labels of too few images.
    """

    def __init__(
        self,
        labels: Iterable[Any],
        num_labels: int,
        images_per_label: int,
        *,
        short: Short = "repeat",
        num_batches: int | None = None,
        order: Order = "grouped",
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        sampler: object = None,
    ) -> None:
        number("num_labels", num_labels, least=1, whole=True)
        number("images_per_label", images_per_label, least=1, whole=True)
        choice("short", short, SHORT)
        choice("order", order, ORDERS)
        number("seed", seed, whole=True)
        if num_batches is not None:
            number("num_batches", num_batches, least=1, whole=True)
        self._labels = _plain(labels)
        self.num_labels, self.images_per_label = num_labels, images_per_label
        self.short: Short = short
        self.num_batches, self.seed = num_batches, seed
        self.order: Order = order
        self._ranks = _ranks(rank, world_size, sampler)
        self._images = self._images_by_label(warn=sampler is None)
        self.num_images = sum(len(images) for images in self._images)
        self._place = _Place()
        # Lightning looks for `set_epoch` in a batch sampler's sampler.
        super().__init__(self, num_labels * images_per_label, drop_last=True)  # type: ignore[arg-type]
        self._survive_rebuilding(rank, world_size)

    def _images_by_label(self, warn: bool) -> list[list[int]]:
        by_label: dict[Any, list[int]] = {}
        for image, label in enumerate(self._labels):
            by_label.setdefault(label, []).append(image)
        wanted = self.images_per_label
        self.short_labels = {label: len(images) for label, images in by_label.items() if len(images) < wanted}
        few = self.short_labels
        if few and self.short == "error":
            remedy = f"{_listed(few)}. short='repeat' repeats their images, short='drop' leaves them out."
            given = f"{len(few)} of {len(by_label)} labels with fewer"
            raise BadData(complaint("labels", given, f"at least {wanted} images (images_per_label) each", remedy))
        if self.short == "drop":
            by_label = {label: images for label, images in by_label.items() if label not in few}
        if self.num_labels > len(by_label):
            left = f", {len(few)} with fewer than {wanted} images left out" if few and self.short == "drop" else ""
            allowed = f"at most {len(by_label)}, the number of different labels{left}"
            raise BadData(complaint("num_labels", self.num_labels, allowed))
        if few and warn and self.rank == 0:
            fate = "they are left out" if self.short == "drop" else "their images come more than once in a batch"
            warnings.warn(
                f"PKBatchSampler: {len(few)} of {len(set(self._labels))} labels have fewer than {wanted} images "
                f"(images_per_label), so {fate}: {_listed(few)}.",
                stacklevel=3,
            )
        return list(by_label.values())

    def _survive_rebuilding(self, rank: int | None, world_size: int | None) -> None:
        """Leave the marks by which Lightning rebuilds a batch sampler as it was, with its own sampler put in.

        Lightning makes these marks itself, but only for samplers that are made inside a `train_dataloader` hook. The
        last one is what it does with the new object: both are to be at the same place, now and later.
        """
        names = ("num_labels", "images_per_label", "short", "num_batches", "order", "seed")
        arguments = {name: getattr(self, name) for name in names}
        arguments |= {"labels": self._labels, "rank": rank, "world_size": world_size, "sampler": None}
        marks = {"args": (), "kwargs": arguments, "default_kwargs": {}, "arg_names": ()}
        for name, value in marks.items():
            setattr(self, f"__pl_saved_{name}", value)
        setattr(self, "__pl_attrs_record", [((self,), _share_place)])

    @property
    def rank(self) -> int:
        """Number of this process among those that share the plan."""
        return self._where()[0]

    @property
    def world_size(self) -> int:
        """Number of processes that share the plan."""
        return self._where()[1]

    @property
    def epoch(self) -> int:
        """Epoch of the pass to come."""
        return self._place.epoch

    def _where(self) -> tuple[int, int]:
        if self._ranks is not None:
            return self._ranks
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch on this rank, also where a pass began in the middle."""
        return self.num_batches or max(1, self.num_images // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's batches of the current epoch, from the place that was loaded; the next pass is the next."""
        place = self._place
        epoch, start = place.epoch, place.batch
        place.epoch, place.batch, place.drawn = epoch + 1, 0, (epoch, start)
        for following, batch in enumerate(self.batches(epoch, start), start + 1):
            place.drawn = (epoch, following)
            yield batch

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """Yield this rank's batches of an epoch from number `start` on, whatever the state is."""
        rank, world_size = self._where()
        return (step[rank] for step in islice(self._steps(epoch, world_size), start, None))

    def _steps(self, epoch: int, world_size: int) -> Iterator[list[list[int]]]:
        """Yield the plan step by step: one batch for each rank."""
        rng = random.Random(f"{self.seed}/{epoch}")
        labels = _Deck(range(len(self._images)), rng)
        decks = [_Deck(images, rng) for images in self._images]
        size = self.num_labels
        together = world_size if size * world_size <= len(decks) else 1
        for _ in range(len(self)):
            drawn = [label for _ in range(world_size // together) for label in labels.deal(size * together)]
            yield [self._batch(decks[label] for label in drawn[r * size : (r + 1) * size]) for r in range(world_size)]

    def _batch(self, decks: Iterable[_Deck]) -> list[int]:
        sets = [deck.deal(self.images_per_label) for deck in decks]
        if self.order == "interleaved":
            return [image for images in zip(*sets, strict=True) for image in images]
        return [image for images in sets for image in images]

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of `epoch`: from its first batch, unless a state of this very epoch was loaded."""
        number("epoch", epoch, least=0, whole=True)
        place = self._place
        if epoch != place.epoch:
            place.epoch, place.batch = epoch, 0
        if place.drawn is not None and place.drawn[0] != epoch:
            place.drawn = None

    def state_dict(self, num_used: int | None = None) -> dict[str, Any]:
        """Return the epoch and the number of the next batch, with what tells this plan from others.

        Args:
            num_used: how many batches of the epoch under way were used, where that is not what was drawn.
        """
        place = self._place
        epoch, batch = place.drawn or (place.epoch, place.batch)
        if num_used is not None and place.drawn is not None:
            batch = num_used
        if batch >= len(self):
            epoch, batch = epoch + 1, 0
        return {"epoch": epoch, "batch": batch, "plan": self.plan()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the next pass begin at the batch that `state_dict` names.

        Raises:
            FinetuneBNError: it is not the state of such a sampler, or a state in the middle of another plan's epoch.
        """
        try:
            epoch, batch, saved = (state_dict[name] for name in ("epoch", "batch", "plan"))
        except (KeyError, TypeError) as error:
            allowed = "what PKBatchSampler.state_dict() returned"
            raise FinetuneBNError(complaint("state_dict", state_dict, allowed)) from error
        number("state_dict['epoch']", epoch, least=0, whole=True)
        number("state_dict['batch']", batch, least=0, whole=True)
        own = self.plan()
        other = [f"{name} {saved.get(name)!r} -> {own[name]!r}" for name in own if saved.get(name) != own[name]]
        if other and batch:
            remedy = "Resume at the beginning of an epoch (call set_epoch), or load the weights alone."
            given = f"batch {batch} of a plan with other arguments: {', '.join(other)}"
            raise FinetuneBNError(complaint("state_dict", given, "a state of the same plan", remedy))
        self._place.epoch, self._place.batch, self._place.drawn = epoch, batch, None

    def plan(self) -> dict[str, Any]:
        """Return what decides the batches of all ranks, as plain data; the labels as a hash."""
        names = ("num_labels", "images_per_label", "short", "order", "seed", "world_size")
        return {name: getattr(self, name) for name in names} | {"num_batches": len(self), "labels": self._digest}

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(repr(self._labels).encode()).hexdigest()[:16]


def _share_place(new: PKBatchSampler, old: PKBatchSampler) -> None:
    new._place = old._place


class _Deck:
    """Deals its cards in random order so that each has come equally often, give or take one."""

    def __init__(self, cards: Sequence[int], rng: random.Random) -> None:
        self._cards, self._rng = cards, rng
        self._left: list[int] = []

    def deal(self, number: int) -> list[int]:
        """Return `number` cards: different ones, as far as there are that many."""
        hand: list[int] = []
        while len(hand) < number:
            hand += self._deal_different(min(number - len(hand), len(self._cards)))
        return hand

    def _deal_different(self, number: int) -> list[int]:
        hand = self._left[-number:]  # from the end, where taking costs nothing
        del self._left[-number:]
        if len(hand) < number:
            # A card that is in the hand already waits in the new deck until the next hand.
            held, fresh = set(hand), self._rng.sample(self._cards, len(self._cards))
            added = [card for card in fresh if card not in held][: number - len(hand)]
            hand += added
            dealt = set(added)
            self._left = [card for card in fresh if card not in dealt]
        return hand


class ResumableDataLoader(DataLoader[Any]):
    """A `DataLoader` over a `PKBatchSampler` that can go on with the next batch, however far its workers read ahead.

    Its state counts the batches that were handed out, also one that training then failed on. Lightning saves and
    restores the state of a loader that has one, so a resumed `Trainer` goes on in the middle of an epoch. The workers
    start with the first batch of a pass, not before: Lightning says which epoch it is after it has asked for the
    iterator, when the workers of a plain `DataLoader` have begun epoch 0 already.

    Args:
        dataset: the images, as many as the sampler has labels.
        batch_sampler: the sampler.
        kwargs: more arguments of `DataLoader`, such as `num_workers`.

    Raises:
        FinetuneBNError: the sampler is of another kind.
        BadData: the sampler was made for another number of images.
    """

    def __init__(self, dataset: Dataset[Any], *, batch_sampler: PKBatchSampler, **kwargs: Any) -> None:
        if not isinstance(batch_sampler, PKBatchSampler):
            raise FinetuneBNError(complaint("batch_sampler", type(batch_sampler).__name__, "a PKBatchSampler"))
        labeled = len(batch_sampler._labels)
        if isinstance(dataset, Sized) and len(dataset) != labeled:
            allowed = f"{labeled} images, one for each label of the sampler"
            raise BadData(complaint("dataset", f"{len(dataset)} images", allowed))
        self._used = [0]
        super().__init__(dataset, batch_sampler=batch_sampler, **kwargs)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the rest of the epoch; a generator, so nothing starts before the first batch is asked for."""
        self._used = used = [self._sampler._place.batch]
        for batch in super().__iter__():
            used[0] += 1
            yield batch

    @property
    def _sampler(self) -> PKBatchSampler:
        assert isinstance(self.batch_sampler, PKBatchSampler)
        return self.batch_sampler

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and the number of the next batch that was not handed out."""
        return self._sampler.state_dict(num_used=self._used[0])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on, from the next pass on, with the batch that `state_dict` names."""
        self._sampler.load_state_dict(state_dict)


def _plain(labels: Any) -> list[Any]:
    """Return labels as a list of plain values, so that equal ones are equal in any container."""
    allowed = "one label an image: integers or strings, or a one-dimensional tensor or array"
    try:
        values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
        values = [value.item() if hasattr(value, "item") else value for value in values]
        usable = not isinstance(labels, str) and len({*values}) > 0
    except (TypeError, ValueError, RuntimeError) as error:  # not iterable, not hashable, or of several numbers each
        raise BadData(complaint("labels", labels, allowed)) from error
    if not usable or any(value != value for value in values):
        raise BadData(complaint("labels", labels, allowed))
    return list(values)


def _ranks(rank: int | None, world_size: int | None, sampler: object) -> tuple[int, int] | None:
    """Return the rank and world size that were given, or `None` where `torch.distributed` is to be asked."""
    if rank is None and world_size is None:
        return (sampler.rank, sampler.num_replicas) if isinstance(sampler, DistributedSampler) else None
    if rank is None or world_size is None:
        raise FinetuneBNError(complaint("rank, world_size", (rank, world_size), "both or neither"))
    number("world_size", world_size, least=1, whole=True)
    number("rank", rank, least=0, whole=True)
    if rank >= world_size:
        raise FinetuneBNError(complaint("rank", rank, f"0 to {world_size - 1} (world_size - 1)"))
    return rank, world_size


def _listed(counts: dict[Any, int]) -> str:
    shown = ", ".join(f"{label!r} ({count})" for label, count in list(counts.items())[:NAMES_SHOWN])
    return shown + (f" and {len(counts) - NAMES_SHOWN} more" if len(counts) > NAMES_SHOWN else "")
