"""A loader that goes on with the next batch of an interrupted epoch, and the samplers that make this possible."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.utilities.checks import number


@dataclass
class Place:
    """The pass to come begins at `start` of `epoch`; `drawn` tells the epoch and how far the last pass got in it."""

    epoch: int = 0
    start: int = 0
    drawn: tuple[int, int] | None = None


class KeepsPlace:
    """A sampler whose passes are decided by its arguments and the epoch, and can begin in the middle of one.

    What is counted (`unit`) is whatever one iteration yields: images, or batches for a batch sampler. A pass starts
    with `begin` and tells by `reached` how far it is; every pass is another epoch, unless `set_epoch` chooses one.
    """

    unit: ClassVar[str] = "batch"
    place: Place

    def plan(self) -> dict[str, Any]:
        """Return what decides the passes beside the epoch, as plain data; never the rank."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Return how much a whole pass yields, also where it begins in the middle."""
        raise NotImplementedError

    @property
    def epoch(self) -> int:
        """Epoch of the pass to come."""
        return self.place.epoch

    def begin(self) -> tuple[int, int]:
        """Begin a pass: return its epoch and the number of its first item; the next one is that of the next epoch."""
        place = self.place
        epoch, start = place.epoch, place.start
        place.epoch, place.start, place.drawn = epoch + 1, 0, (epoch, start)
        return epoch, start

    def reached(self, epoch: int, following: int) -> None:
        """Note that the pass of `epoch` yields the item in front of number `following`."""
        self.place.drawn = (epoch, following)

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of `epoch`: from its beginning, unless a state of this very epoch was loaded."""
        epoch = number("epoch", epoch, least=0, whole=True)
        place = self.place
        if epoch != place.epoch:
            place.epoch, place.start = epoch, 0
        if place.drawn is not None and place.drawn[0] != epoch:
            place.drawn = None

    def state_dict(self, num_used: int | None = None) -> dict[str, Any]:
        """Return the epoch and the number of the next item, with what tells this plan from others.

        Args:
            num_used: how much of the epoch under way was used, where that is not what was drawn.
        """
        place = self.place
        epoch, following = place.drawn or (place.epoch, place.start)
        if num_used is not None and place.drawn is not None:
            following = num_used
        if following >= len(self):
            epoch, following = epoch + 1, 0
        return {"epoch": epoch, self.unit: following, "plan": self.plan()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the next pass begin where `state_dict` says.

        Raises:
            FinetuneBNError: it is not the state of such a sampler, or a state in the middle of another plan's epoch.
        """
        kind = type(self).__name__
        try:
            epoch, start, saved = (state_dict[name] for name in ("epoch", self.unit, "plan"))
        except (KeyError, TypeError) as error:
            allowed = f"what {kind}.state_dict() returned"
            raise FinetuneBNError(complaint("state_dict", state_dict, allowed)) from error
        epoch = number("state_dict['epoch']", epoch, least=0, whole=True)
        start = number(f"state_dict['{self.unit}']", start, least=0, whole=True)
        own = self.plan()
        other = [f"{name} {saved.get(name)!r} -> {own[name]!r}" for name in own if saved.get(name) != own[name]]
        if other and start:
            remedy = "Resume at the beginning of an epoch (call set_epoch), or load the weights alone."
            given = f"{self.unit} {start} of a plan with other arguments: {', '.join(other)}"
            raise FinetuneBNError(complaint("state_dict", given, "a state of the same plan", remedy))
        self.place.epoch, self.place.start, self.place.drawn = epoch, start, None


class InOrder(KeepsPlace, SequentialSampler):
    """Yields 0, 1, 2, ... like torch's `SequentialSampler`, from the place that was loaded."""

    unit = "image"

    def __init__(self, data_source: Sized) -> None:
        super().__init__(data_source)
        self.place = Place()

    def __iter__(self) -> Iterator[int]:
        """Yield the rest of the pass."""
        epoch, start = self.begin()
        for image in range(start, len(self)):
            self.reached(epoch, image + 1)
            yield image

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.data_source)

    def plan(self) -> dict[str, Any]:
        """Return the number of images: nothing else decides."""
        return {"images": len(self)}


class ResumableDataLoader(DataLoader[Any]):
    """A `DataLoader` that can go on with the next batch, however far its workers read ahead.

    Its sampler is one of this package: a `PKBatchSampler` as the batch sampler, or a `SeededOrder` (shuffled images)
    as the sampler; without either it takes the images in their order. Its state counts the batches that were handed
    out, also one that training then failed on. Lightning saves and restores the state of a loader that has one, so a
    resumed `Trainer` goes on in the middle of an epoch, also where `configure_optimizers` reads
    `trainer.estimated_stepping_batches`, which makes Lightning set loaders up before it has read the checkpoint.

    The workers start with the first batch of a pass, not before: Lightning says which epoch it is after it has asked
    for the iterator, when the workers of a plain `DataLoader` have begun epoch 0 already.

    Workers are seeded anew for each epoch, by the seed of the sampler, the epoch and the rank, where no `generator` is
    given. What a data set draws in them from the global generators is then the same after a resume between epochs; not
    in the middle of one, nor with persistent workers. The data modules of this package draw nothing there, since each
    image brings a seed of its own.

    Args:
        dataset: the images; as many as the sampler has labels or images.
        batch_sampler: a `PKBatchSampler`.
        sampler: a `SeededOrder`, beside `batch_size`.
        kwargs: more arguments of `DataLoader`, such as `batch_size`, `drop_last` or `num_workers`.

    Raises:
        FinetuneBNError: the sampler is of another kind.
        BadData: the sampler was made for another number of images.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_sampler: Any = None,
        sampler: Any = None,
        **kwargs: Any,
    ) -> None:
        if batch_sampler is None and (sampler is None or type(sampler) is SequentialSampler):
            if kwargs.get("shuffle"):
                remedy = "Pass sampler=SeededOrder(dataset, seed=0): its order depends on seed and epoch alone."
                raise FinetuneBNError(complaint("shuffle", True, "False or nothing", remedy))
            sampler = InOrder(dataset)  # type: ignore[arg-type]
        given, name = (sampler, "sampler") if batch_sampler is None else (batch_sampler, "batch_sampler")
        if not isinstance(given, KeepsPlace):
            allowed = "a PKBatchSampler" if name == "batch_sampler" else "a SeededOrder"
            raise FinetuneBNError(complaint(name, type(given).__name__, allowed))
        covered = getattr(given, "num_items", None)
        if isinstance(dataset, Sized) and covered is not None and len(dataset) != covered:
            what = "one for each label of the sampler" if name == "batch_sampler" else "as many as the sampler has"
            raise BadData(complaint("dataset", f"{len(dataset)} images", f"{covered} images, {what}"))
        self._keeper: KeepsPlace = given
        self._in_batches = batch_sampler is not None
        self._used = [0]
        self._seeds_workers = kwargs.get("generator") is None
        if self._seeds_workers:
            kwargs["generator"] = torch.Generator()
        chosen = {"batch_sampler": batch_sampler} if batch_sampler is not None else {"sampler": sampler}
        super().__init__(dataset, **chosen, **kwargs)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the rest of the epoch; a generator, so nothing starts before the first batch is asked for."""
        waiting = _waiting_state(self)
        if waiting is not None:
            self.load_state_dict(waiting)
        self._used = used = [self._keeper.place.start]
        if self._seeds_workers:
            # Drawn from the global generator, the seed of the workers would be another number after a resume.
            parts = self._keeper.plan().get("seed"), self._keeper.epoch, getattr(self._keeper, "rank", 0)
            self.generator.manual_seed(int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16))
        step = self._step
        for batch in super().__iter__():
            used[0] += step
            yield batch

    @property
    def _step(self) -> int:
        """What the sampler counts for a batch."""
        return 1 if self._in_batches else int(self.batch_size or 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and the number of the next batch (or image) that was not handed out."""
        used, step = self._used[0], self._step
        whole = len(self._keeper)
        if self.drop_last and step > 1 and whole - used < step:
            used = whole  # what is left of the epoch fills no batch
        return self._keeper.state_dict(num_used=used)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on, from the next pass on, with the batch that `state_dict` names."""
        self._keeper.load_state_dict(state_dict)


def _waiting_state(loader: DataLoader[Any]) -> dict[str, Any] | None:
    """Return a state of `loader` that Lightning has read from a checkpoint and not handed over, or `None`.

    Lightning (seen in 2.6) hands loaders their state when it sets them up. Where `trainer.estimated_stepping_batches`
    is read in `configure_optimizers` that is before it has read the checkpoint, and the state stays in the fit loop.
    The loader knows no Trainer, but the loop that owns it is among those who ask it for its first batch.
    """
    frame = sys._getframe(1)
    while frame is not None:
        loop: Any = frame.f_locals.get("self") if frame.f_code.co_name == "advance" else None
        if type(loop).__name__ == "_FitLoop":
            _count_begun(loop)
            states = getattr(loop, "_combined_loader_states_to_load", None)
            owned = getattr(getattr(loop, "_combined_loader", None), "flattened", [])
            stateful = [one for one in owned if hasattr(one, "state_dict") and hasattr(one, "load_state_dict")]
            mine = [number for number, one in enumerate(stateful) if one is loader]
            if loop.restarting and states and mine and len(states) == len(stateful):
                state: dict[str, Any] = states[mine[0]]
                return state
            return None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _count_begun(loop: Any) -> None:
    """Count an epoch as begun where Lightning (seen in 2.6) forgot to: behind a checkpoint of an epoch's last step.

    It takes the first epoch of such a resumed run for the rest of the one before, which it has counted as done. A
    second resume in mid-epoch would then begin that epoch anew.
    """
    progress = loop.epoch_progress
    if loop.restarted_mid_epoch and progress.current.processed >= progress.current.ready:
        progress.increment_ready()
        progress.increment_started()
