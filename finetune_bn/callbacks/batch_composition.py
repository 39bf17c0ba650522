"""Check that the training batches of any Trainer are P labels x K images, as the sampler promised."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args
from weakref import WeakSet

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from finetune_bn.callbacks.lightning_names import UNSYNCHRONIZED, is_a
from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.metric_learning.pk_sampler import Order, PKBatchSampler
from finetune_bn.metric_learning.resumable_loader import ResumableDataLoader
from finetune_bn.utilities.checks import choice, number
from finetune_bn.utilities.labels import labels_of

T = TypeVar("T")
OnMismatch = Literal["error", "warn"]
ON_MISMATCH: tuple[OnMismatch, ...] = get_args(OnMismatch)
ENOUGH_IMAGES = 16  # of a process, for live BatchNorm: with fewer its statistics are noise
_WHERE = "Say where they are: BatchCompositionGuard(labels=)."
_TOLD: WeakSet[pl.Trainer] = WeakSet()


@dataclass(frozen=True)
class _Promise:
    """What a batch is to hold; `None` is anything."""

    num_labels: int | None
    images_per_label: int | None
    order: Order | None = None

    def __str__(self) -> str:
        labels = "any number of labels" if self.num_labels is None else f"{self.num_labels} labels"
        images = "equally many images" if self.images_per_label is None else f"{self.images_per_label} images"
        return f"{labels} x {images}{f', {self.order}' if self.order else ''}"


class BatchCompositionGuard(Callback):
    """Check that training batches hold P labels x K images on every rank, before the network learns from others.

    With several processes Lightning deals out the images of a sampler one by one, which tears P x K batches apart
    without a word: of 4 images a label 1 to 3 are left. A `PKBatchSampler` of this package survives that; for other
    samplers say what a batch is to hold. The guard also finds labels that were given to the sampler in another order
    than that of the data set, ranks that draw different plans or the same batches, and a resumed run whose loader
    begins its epoch anew.

    Args:
        num_labels: How many labels a batch is to hold (P). By default what the PKBatchSampler of the training loader
            says.
        images_per_label: How many images of each label a batch is to hold (K). By default what that sampler says.
        labels: Where the labels are in a batch, a position in a tuple or a key of a dictionary. By default the second
            part of a tuple, and labels, label, targets, target or y in a dictionary.
        first_batches: How many batches are checked at the beginning of each fit, on each rank.
        on_mismatch: What happens where a batch is another one. error stops the training. warn goes on, and warns once.
    """

    def __init__(
        self,
        num_labels: int | None = None,
        images_per_label: int | None = None,
        labels: int | str | None = None,
        first_batches: int = 10,
        on_mismatch: OnMismatch = "error",
    ) -> None:
        super().__init__()
        for name, value in (("num_labels", num_labels), ("images_per_label", images_per_label)):
            if value is not None:
                number(name, value, least=1, whole=True)
        number("first_batches", first_batches, least=1, whole=True)
        choice("on_mismatch", on_mismatch, ON_MISMATCH)
        self.num_labels, self.images_per_label = num_labels, images_per_label
        self.labels = labels
        self.first_batches = first_batches
        self.on_mismatch: OnMismatch = on_mismatch
        self.checked = 0
        self.mismatches = 0
        self._promise = _Promise(num_labels, images_per_label)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.checked = self.mismatches = 0
        loader = _only_loader(trainer)
        sampler = _pk_sampler(loader)
        self._promise = self._promised(sampler)
        if sampler is not None:
            _check_ranks(trainer, sampler)
            _check_resumed(trainer, loader)
        warn_of_small_batches(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.checked == self.first_batches:
            return
        self.checked += 1
        promise = self._promise
        labels = labels_of(batch, self.labels, _WHERE)
        own = pk_violation(labels, promise.num_labels, promise.images_per_label, promise.order)
        found = [f"{said} (batch {batch_idx}, rank {rank})" for rank, said in enumerate(_of_all_ranks(own)) if said]
        if found:
            self._complain(trainer, found[0])
        elif self.checked == self.first_batches and not self.mismatches:
            rank_zero_info(f"BatchCompositionGuard: the first {self.checked} batches are {promise}.")

    def _promised(self, sampler: PKBatchSampler | None) -> _Promise:
        if sampler is None:
            if self.num_labels is None and self.images_per_label is None:
                allowed = "a number, where the training loader has no PKBatchSampler that says it"
                raise FinetuneBNError(complaint("num_labels, images_per_label", (None, None), allowed))
            return _Promise(self.num_labels, self.images_per_label)
        for name in ("num_labels", "images_per_label"):
            asked, given = getattr(self, name), getattr(sampler, name)
            if asked not in (None, given):
                raise FinetuneBNError(complaint(name, asked, f"{given}, the sampler's, or null"))
        return _Promise(sampler.num_labels, sampler.images_per_label, sampler.order)

    def _complain(self, trainer: pl.Trainer, found: str) -> None:
        self.mismatches += 1
        text = complaint("training batch", found, str(self._promise), _remedy(trainer))
        if self.on_mismatch == "error":
            raise BadData(text)
        if self.mismatches == 1:
            rank_zero_warn(f"BatchCompositionGuard: {text}")


def warn_of_small_batches(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Warn, once a Trainer, where several processes each normalize by a few images of their own.

    Where they do not, it is told how many images a step sees: a config that was made for one device has the same
    `batch_size` for each of eight.

    Args:
        trainer: the Trainer, whose training loader tells how many images a batch has.
        pl_module: the module; BatchNorm layers that are frozen or synchronized are no matter of warning.
    """
    if trainer.world_size == 1 or trainer in _TOLD:
        return
    _TOLD.add(trainer)
    live = [
        name
        for name, module in pl_module.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm) and module.training
    ]
    loaders = CombinedLoader(trainer.train_dataloader or []).flattened
    found = [getattr(getattr(loader, "batch_sampler", None), "batch_size", None) for loader in loaders]
    sizes = [size for size in found if isinstance(size, int)]
    if not sizes:
        return
    each, processes = min(sizes), trainer.world_size
    synchronize = "" if is_a(trainer.strategy, UNSYNCHRONIZED) else "set trainer.sync_batchnorm: true, "
    if live and each < ENOUGH_IMAGES:
        rank_zero_warn(
            f"{len(live)} live BatchNorm layers ({live[0]}, ...) normalize by the {each} images of their own process, "
            f"not by the {each * processes} of all {processes}, and the running statistics that are saved are those of "
            f"process 0 alone. Freeze them (policy Freeze), {synchronize}or give each process {ENOUGH_IMAGES} images "
            "or more."
        )
    else:
        rank_zero_info(
            f"{processes} processes with batches of {each} images: {each * processes} images a forward pass. Where "
            f"batch_size and learning rate were chosen on one device, divide batch_size by {processes}, or choose the "
            "learning rate anew."
        )
        if live:
            rank_zero_warn(
                f"{len(live)} live BatchNorm layers ({live[0]}, ...) normalize by the images of their own process, and "
                f"the running statistics that are saved are those of process 0 alone, of one in {processes} images. "
                f"Freeze them (policy Freeze), {synchronize}or pool the statistics of all processes behind the "
                "training (callback BatchNormRecalibration)."
            )


def pk_violation(
    labels: Tensor, num_labels: int | None, images_per_label: int | None, order: Order | None = None
) -> str:
    """Return in words how the labels of a batch [N] differ from P labels x K images; empty where they do not.

    Args:
        labels: one label an image, in the order of the batch.
        num_labels: P, or `None` for any.
        images_per_label: K, or `None` for any number that all labels have.
        order: how the images should stand, see `PKBatchSampler`; `None` for any. Needs P and K.
    """
    counts = Counter(labels.reshape(-1).tolist())
    least, most = min(counts.values(), default=0), max(counts.values(), default=0)
    if num_labels not in (None, len(counts)) or least != most or images_per_label not in (None, least):
        return f"{len(counts)} labels with {least if least == most else f'{least} to {most}'} images each"
    if order is None or num_labels is None:
        return ""
    table = labels.reshape((num_labels, -1) if order == "grouped" else (-1, num_labels))
    same = table == (table[:, :1] if order == "grouped" else table[:1])
    return "" if bool(same.all()) else f"the right number of each, but not in {order} order"


def _of_all_ranks(value: T) -> list[T]:
    """Return what each rank passed: so all of them raise, and none is left waiting for one that did."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def _check_ranks(trainer: pl.Trainer, sampler: PKBatchSampler) -> None:
    """Raise unless the ranks share one plan, each with its own part of it."""
    whole = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    places = (sampler.rank, sampler.world_size), (whole["rank"], whole["num_replicas"])
    states = _of_all_ranks((places, sampler.plan()))
    for (found, expected), _ in states:
        if found != expected:
            remedy = "Leave rank and world_size of PKBatchSampler out: it asks torch.distributed."
            raise FinetuneBNError(complaint("rank, world_size", found, f"{expected}, as the Trainer has it", remedy))
    first = states[0][1]
    for rank, (_, plan) in enumerate(states):
        given = {name: plan[name] for name in plan if plan[name] != first[name]}
        if given:
            allowed = f"{ {name: first[name] for name in given} } on rank {rank}, as on rank 0"
            remedy = "The ranks draw parts of one plan: give every rank the same labels, seed and numbers."
            raise FinetuneBNError(complaint("PKBatchSampler", given, allowed, remedy))


def _only_loader(trainer: pl.Trainer) -> Any:
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    if len(loaders) != 1:
        remedy = "Check such batches in the training step, by finetune_bn.callbacks.batch_composition.pk_violation."
        raise FinetuneBNError(complaint("train_dataloader", f"{len(loaders)} loaders", "one, to be guarded", remedy))
    return loaders[0]


def _pk_sampler(loader: Any) -> PKBatchSampler | None:
    sampler = getattr(loader, "batch_sampler", None)
    return sampler if isinstance(sampler, PKBatchSampler) else None


def _remedy(trainer: pl.Trainer) -> str:
    loader = _only_loader(trainer)
    if _pk_sampler(loader) is not None:
        return (
            "The sampler drew it right, so its labels are not those of the data set in the data set's order, or the "
            "collate function or a hook changes the batch."
        )
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if any(isinstance(sampler, DistributedSamplerWrapper) for sampler in (getattr(loader, "sampler", None), inner)):
        return (
            f"Lightning dealt the images of the sampler out to {trainer.world_size} processes one by one. Use "
            "finetune_bn.metric_learning.pk_sampler.PKBatchSampler as the batch_sampler of the DataLoader, or "
            "Trainer(use_distributed_sampler=False) with a sampler that gives each process its own batches."
        )
    return "Use finetune_bn.metric_learning.pk_sampler.PKBatchSampler as the batch_sampler of the DataLoader."


def _check_resumed(trainer: pl.Trainer, loader: Any) -> None:
    """Warn where a resumed run does not go on with the next batch."""
    if not trainer.ckpt_path:
        return
    epochs = trainer.fit_loop.epoch_progress.current
    mid_epoch = 0 < trainer.fit_loop.batch_idx + 1 < trainer.num_training_batches
    remedy = "Use finetune_bn.ResumableDataLoader in place of the DataLoader to go on with the next batch."
    if hasattr(loader, "load_state_dict"):
        kept_back = trainer.fit_loop._combined_loader_states_to_load and mid_epoch
        if kept_back and not isinstance(loader, ResumableDataLoader):
            rank_zero_warn(
                "BatchCompositionGuard: Lightning has not given the loader the state that the checkpoint holds, since "
                "trainer.estimated_stepping_batches was read in configure_optimizers: the loader begins the epoch "
                f"anew. {remedy}"
            )
            return
        if trainer.max_steps == -1 or mid_epoch or epochs.ready == epochs.completed:
            return
        cause = "is from the end of an epoch, behind which Lightning, under max_steps, puts an epoch of one batch"
        remedy = "Set max_epochs in place of max_steps, or resume from a checkpoint of a step."
    elif mid_epoch:
        cause = "is from the middle of an epoch, and the loader begins that epoch anew"
    elif trainer.current_epoch and getattr(loader, "num_workers", 0):
        cause = "is from behind epoch 0, and the workers of the loader begin epoch 0 before they are told which it is"
    else:
        return
    rank_zero_warn(f"BatchCompositionGuard: the checkpoint {cause}: images come again or are left out. {remedy}")
