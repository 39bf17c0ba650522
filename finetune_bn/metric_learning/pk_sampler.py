"""Batches of exactly P labels x K images on every rank, from one seeded plan.

An image is known by its position in the data set, a label by whatever the data set calls it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler

from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.metric_learning.label_plan import EpochPlan, Labels
from finetune_bn.metric_learning.resumable_loader import KeepsPlace, Place
from finetune_bn.utilities.checks import choice, number

Short = Literal["repeat", "drop", "error"]
SHORT: tuple[Short, ...] = get_args(Short)
Order = Literal["grouped", "interleaved"]
ORDERS: tuple[Order, ...] = get_args(Order)
NAMES_SHOWN = 5
_VERSION = 2  # of the way in which batches are dealt: a state of another one names other batches


class PKBatchSampler(KeepsPlace, BatchSampler):
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
        self.num_labels: int = number("num_labels", num_labels, least=1, whole=True)
        self.images_per_label: int = number("images_per_label", images_per_label, least=1, whole=True)
        choice("short", short, SHORT)
        choice("order", order, ORDERS)
        self.short: Short = short
        self.order: Order = order
        self.seed: int = number("seed", seed, whole=True)
        self.num_batches: int | None = number("num_batches", num_batches, least=1, whole=True, none=True)
        self._labels = Labels.read(labels)
        self.num_items = len(self._labels)
        self._ranks = _ranks(rank, world_size, sampler)
        self._images, self._starts = self._sorted_by_label(warn=sampler is None)
        self.num_images = len(self._images)
        self.place = Place()
        # Lightning looks for `set_epoch` in a batch sampler's sampler.
        super().__init__(self, self.num_labels * self.images_per_label, drop_last=True)  # type: ignore[arg-type]
        self._survive_rebuilding(rank, world_size)

    def _sorted_by_label(self, warn: bool) -> tuple[Tensor, Tensor]:
        """Return the images that can be drawn, label by label, and where those of each label begin."""
        labels, wanted = self._labels, self.images_per_label
        is_short = labels.counts < wanted
        few = {labels.names[label]: int(labels.counts[label]) for label in is_short.nonzero().flatten().tolist()}
        self.short_labels: dict[Any, int] = few
        if few and self.short == "error":
            remedy = f"{_listed(few)}. short='repeat' repeats their images, short='drop' leaves them out."
            given = f"{len(few)} of {len(labels.names)} labels with fewer"
            raise BadData(complaint("labels", given, f"at least {wanted} images (images_per_label) each", remedy))
        images, counts = labels.numbers.argsort(stable=True), labels.counts
        if self.short == "drop" and few:
            images, counts = images[~is_short[labels.numbers[images]]], counts[~is_short]
        if self.num_labels > len(counts):
            left = f", {len(few)} with fewer than {wanted} images left out" if few and self.short == "drop" else ""
            allowed = f"at most {len(counts)}, the number of different labels{left}"
            raise BadData(complaint("num_labels", self.num_labels, allowed))
        if few and warn and self.rank == 0:
            fate = "they are left out" if self.short == "drop" else "their images come more than once in a batch"
            warnings.warn(
                f"PKBatchSampler: {len(few)} of {len(labels.names)} labels have fewer than {wanted} images "
                f"(images_per_label), so {fate}: {_listed(few)}.",
                stacklevel=3,
            )
        return images, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])

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
        epoch, start = self.begin()
        for following, batch in enumerate(self.batches(epoch, start), start + 1):
            self.reached(epoch, following)
            yield batch

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """Yield this rank's batches of an epoch from number `start` on, whatever the state is."""
        rank, world_size = self._where()
        size = self.num_labels, self.images_per_label
        plan = EpochPlan(self._images, self._starts, size, len(self), world_size, f"{self.seed}/{epoch}")
        for batch in plan.batches(rank, start):
            yield (batch.T if self.order == "interleaved" else batch).flatten().tolist()

    def plan(self) -> dict[str, Any]:
        """Return what decides the batches of all ranks, as plain data; the labels as a hash."""
        names = ("num_labels", "images_per_label", "short", "order", "seed", "world_size")
        own = {name: getattr(self, name) for name in names}
        return {"version": _VERSION, **own, "num_batches": len(self), "labels": self._labels.digest}


def _share_place(new: PKBatchSampler, old: PKBatchSampler) -> None:
    new.place = old.place


def _ranks(rank: int | None, world_size: int | None, sampler: object) -> tuple[int, int] | None:
    """Return the rank and world size that were given, or `None` where `torch.distributed` is to be asked."""
    if rank is None and world_size is None:
        return (sampler.rank, sampler.num_replicas) if isinstance(sampler, DistributedSampler) else None
    if rank is None or world_size is None:
        raise FinetuneBNError(complaint("rank, world_size", (rank, world_size), "both or neither"))
    world_size = int(number("world_size", world_size, least=1, whole=True))
    rank = int(number("rank", rank, least=0, whole=True))
    if rank >= world_size:
        raise FinetuneBNError(complaint("rank", rank, f"0 to {world_size - 1} (world_size - 1)"))
    return rank, world_size


def _listed(counts: dict[Any, int]) -> str:
    shown = ", ".join(f"{label!r} ({count})" for label, count in list(counts.items())[:NAMES_SHOWN])
    return shown + (f" and {len(counts) - NAMES_SHOWN} more" if len(counts) > NAMES_SHOWN else "")
