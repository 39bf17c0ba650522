"""Compare treatments for a module and its data without a training behind it: what the command `compare` does."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

from finetune_bn.callbacks.auto import BudgetName, Chosen, decide
from finetune_bn.callbacks.recalibrate_checkpoint import attach_alone


def compare_in(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    datamodule: pl.LightningDataModule,
    module: str | None,
    budget: BudgetName,
    folder: str | Path | None = None,
) -> Chosen:
    """Compare treatments by short trainings of copies of a module; nothing else is trained.

    Args:
        trainer: a Trainer of one process, with the callbacks and limits of the training that is planned.
        model: the module, as it was built for that.
        datamodule: its data.
        module: attribute path of the part whose layers are treated; None: the whole.
        budget: fast, good or best.
        folder: where finished trainings are kept; None: in the Trainer's default_root_dir.

    Raises:
        FinetuneBNError: see `decide`.
    """
    attach_alone(trainer, model, datamodule, "train")
    model.to(trainer.strategy.root_device)
    return decide(trainer, model, module, budget, folder=folder)
