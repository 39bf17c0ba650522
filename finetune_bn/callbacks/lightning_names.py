"""What is read of Lightning that is private there, or known by its name alone; seen in versions 2.5.0 to 2.6.6.

Classes are told by their names, so that those of `pytorch_lightning` count as those of `lightning.pytorch`.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

SHARDED = frozenset({"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"})
# They take `sync_batchnorm=True`, and no layer is synchronized.
UNSYNCHRONIZED = frozenset({"ModelParallelStrategy", "DeepSpeedStrategy"})
AVERAGING = frozenset({"WeightAveraging", "StochasticWeightAveraging"})
# They set free, epoch by epoch, what is trained.
FINETUNING = frozenset({"BaseFinetuning"})
# It writes down the names of the parameters in its own `setup`.
SCHEDULING = frozenset({"FinetuningScheduler", "FTSBase"})


def is_a(thing: object, names: frozenset[str]) -> bool:
    """Tell whether a class of one of these names is among the classes of an object."""
    return any(cls.__name__ in names for cls in type(thing).__mro__)


def overrides(pl_module: pl.LightningModule, hook: str) -> bool:
    """Tell whether a LightningModule has a hook of its own."""
    base = next((cls for cls in type(pl_module).__mro__ if cls.__name__ == "LightningModule"), object)
    return hook in vars(pl_module) or getattr(type(pl_module), hook, None) is not getattr(base, hook, None)


def ddp_options(trainer: pl.Trainer) -> dict[str, Any] | None:
    """Return what the user passed on to DistributedDataParallel; None where the strategy is no DDP."""
    if not is_a(trainer.strategy, frozenset({"DDPStrategy"})):
        return None
    options: dict[str, Any] = trainer.strategy._ddp_kwargs  # type: ignore[attr-defined]
    return options


def ignores_sync_batchnorm(trainer: pl.Trainer) -> bool:
    """Tell whether `sync_batchnorm=True` was asked for under a strategy that does nothing about it."""
    asked = getattr(trainer.strategy, "_layer_sync", None) is not None
    return asked and is_a(trainer.strategy, UNSYNCHRONIZED)


def logged_step(trainer: pl.Trainer) -> int:
    """Return the step under which Lightning logs what a training step logs; `global_step` is another."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def before_transfer(pl_module: pl.LightningModule, batch: Any) -> Any:
    """Pass a batch through the module's and the data module's `on_before_batch_transfer`."""
    return pl_module._on_before_batch_transfer(batch, dataloader_idx=0)


def attach_data(trainer: pl.Trainer, pl_module: pl.LightningModule, datamodule: pl.LightningDataModule) -> None:
    """Let hooks and data find their Trainer, outside of its loops."""
    trainer._data_connector.attach_data(pl_module, datamodule=datamodule)


def own_loader(trainer: pl.Trainer, split: str) -> Any:
    """Return what the data module, the arguments of `fit` or the module give as training or validation loaders, anew.

    Args:
        trainer: with its data attached.
        split: train or val.
    """
    loop: Any = trainer.fit_loop
    source = loop._data_source if split == "train" else loop.epoch_loop.val_loop._data_source
    return source.dataloader() if source.is_defined() else None
