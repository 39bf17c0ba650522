"""Warn of what several processes do to a training that nobody would see in its log."""

from __future__ import annotations

from weakref import WeakSet

import lightning.pytorch as pl
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

ENOUGH_IMAGES = 16  # of a process, for live BatchNorm: with fewer its statistics are noise
_warned: WeakSet[pl.Trainer] = WeakSet()


def warn_of_processes(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Warn, once for a Trainer, of live BatchNorm layers that several processes train.

    Of live BatchNorm layers that are not synchronized: each process normalizes by its own images, and the running
    statistics that are saved are those of process 0. One process, and layers that are frozen or synchronized, are no
    matter of warning.

    Args:
        trainer: the Trainer, whose training loader tells how many images a batch has.
        pl_module: the module.
    """
    if trainer.world_size == 1 or trainer in _warned:
        return
    _warned.add(trainer)
    sizes = _batch_sizes(trainer)
    live = [
        name
        for name, module in pl_module.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm) and module.training
    ]
    if not live:
        return
    layers = f"{len(live)} live BatchNorm layers ({live[0]}, ...)"
    saved = "the running statistics that are saved are those of process 0 alone"
    if sizes and min(sizes) < ENOUGH_IMAGES:
        rank_zero_warn(
            f"{layers} normalize by the {min(sizes)} images of their own process, not by the "
            f"{min(sizes) * trainer.world_size} of all {trainer.world_size}, and {saved}. Freeze them (policy Freeze), "
            f"set trainer.sync_batchnorm: true, or give each process {ENOUGH_IMAGES} images or more."
        )
    else:
        rank_zero_warn(
            f"{layers} normalize by the images of their own process, and {saved}, of one in {trainer.world_size} "
            "images. Freeze them (policy Freeze), set trainer.sync_batchnorm: true, or pool the statistics of all "
            "processes behind the training (callback BatchNormRecalibration)."
        )


def _batch_sizes(trainer: pl.Trainer) -> list[int]:
    """Return the images of a batch of one process, of each training loader that says so."""
    loaders = CombinedLoader(trainer.train_dataloader or []).flattened
    found = [getattr(getattr(loader, "batch_sampler", None), "batch_size", None) for loader in loaders]
    return [size for size in found if isinstance(size, int)]


def warn_of_open_devices(world_size: int, batch_size: int | None) -> None:
    """Warn that a config which does not say on how many devices it runs has found several.

    A step sees as many times the images, and an epoch has as many times fewer steps: what is silent under one device
    is another training under eight.

    Args:
        world_size: processes of the run.
        batch_size: images of a batch of one of them, where that is known.
    """
    if world_size == 1:
        return
    images = "" if batch_size is None else f" ({world_size} x {batch_size} = {world_size * batch_size})"
    rank_zero_warn(
        f"trainer.devices is auto, and {world_size} devices were found: a step sees {world_size} times the images of "
        f"one process{images}, and an epoch has {world_size} times fewer steps. A learning rate, warm-up or number of "
        f"steps for one device is for another training. Set trainer.devices: 1, or divide the batch size by "
        f"{world_size}; say devices: {world_size} where it is meant so."
    )
