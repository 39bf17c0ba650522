"""Bound the optimizer's steps on the convolutions of a network whose BatchNorm layers are frozen."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from finetune_bn.callbacks.module import check_whole_network
from finetune_bn.errors import FinetuneBNError
from finetune_bn.optim.step_limit import RATIO, LimitedSteps, check_ratio, limit_steps


class StepLimit(Callback):
    """Keep a learning rate that is too large for frozen BatchNorm layers from ruining the network.

    No step of an optimizer moves the weights of a convolution's output channel by more than a small part of their norm,
    which follows the schedule of the learning rate. Steps within that are left alone to the last bit. In this way
    frozen layers tolerate learning rates as live ones do, which take no notice of the size of the weights before them.

    Logged is step_limit/share, the share of the channels whose latest step was shortened. Near 0 the limit does
    nothing; near 1 the learning rate no longer decides how far steps go.

    Attributes:
        limits: one for each optimizer that trains convolutions, while a training goes on.

    Args:
        ratio: The largest step of an output channel at the peak of the learning rate, as a share of the norm of its
            weights.
    """

    def __init__(self, ratio: float = RATIO) -> None:
        super().__init__()
        check_ratio(ratio)
        self.ratio = ratio
        self.limits: list[LimitedSteps] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_whole_network(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove()
        problem: FinetuneBNError | None = None
        for optimizer in trainer.optimizers:
            try:
                self.limits.append(limit_steps(optimizer, pl_module, self.ratio))
            except FinetuneBNError as error:  # one that trains the head alone has nothing to be limited
                problem = error
        if problem is not None and not self.limits:
            raise problem

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        shares = [share for limit in self.limits if (share := limit.share) is not None]
        if shares:
            pl_module.log("step_limit/share", torch.stack(shares).mean())

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        for limit in self.limits:
            limit.remove()
        self.limits = []
