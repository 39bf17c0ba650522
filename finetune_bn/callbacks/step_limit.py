"""Bound the optimizer's steps on the convolutions of a network whose BatchNorm layers are frozen."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from finetune_bn.callbacks.conversion import BatchNormConversion
from finetune_bn.callbacks.conversion_checks import example_for
from finetune_bn.callbacks.lightning_names import is_a
from finetune_bn.callbacks.module import check_whole_network
from finetune_bn.optim.step_limit import FLOOR, RATIO, LimitedSteps, check_ratio
from finetune_bn.utilities.checks import number


class StepLimit(Callback):
    """Keep a learning rate that is too large for frozen BatchNorm layers from ruining the network.

    No step of an optimizer moves the weights of a convolution's output channel by more than a small part of their norm,
    which follows the schedule of the learning rate. Steps within that are left alone to the last bit. In this way
    frozen layers tolerate learning rates as live ones do, which take no notice of the size of the weights before them.

    Bounded are the convolutions with a frozen layer behind, also those that a callback such as BackboneFinetuning adds
    to the optimizer later. Heads, adapters, decoders that were not pretrained and what starts at zero are not. Which
    are is said at the start; a LightningModule with an `example_input_array` (or an `example_input` of
    BatchNormConversion) lets it be found out from a forward pass.

    Logged is step_limit/share, the share of the bounded channels whose latest step was shortened. Near 0 the limit does
    nothing; near 1 the learning rate no longer decides how far steps go.

    Attributes:
        limits: one for each optimizer, while a training goes on.

    Args:
        ratio: The largest step of an output channel at the peak of the learning rate, as a share of the norm of its
            weights.
        floor: A channel whose weights have a smaller norm than this counts with this one, so that it can be learned.
    """

    def __init__(self, ratio: float = RATIO, floor: float = FLOOR) -> None:
        super().__init__()
        check_ratio(ratio)
        self.ratio = ratio
        self.floor = number("floor", floor, above=0, below=float("inf"))
        self.limits: list[LimitedSteps] = []
        self._new: frozenset[str] = frozenset()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_whole_network(trainer)
            self._new = frozenset()

    @override
    def state_dict(self) -> dict[str, Any]:
        # Of a convolution that started at zero nothing tells that, once it has been trained.
        return {"new": sorted(self._new.union(*(limit.new for limit in self.limits)))}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._new = frozenset(state_dict.get("new", ()))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove()
        # What was given to find out what can be folded tells, too, what is behind a convolution.
        conversions = [c for c in trainer.callbacks if isinstance(c, BatchNormConversion)]  # type: ignore[attr-defined]
        whole = [c for c in conversions if c.module is None]
        example = example_for(pl_module, None, whole[0].example_input) if whole else None
        schedule = frozenset({"BatchNormSchedule"})  # by name: its file imports this one
        later = any(is_a(c, schedule) for c in trainer.callbacks)  # type: ignore[attr-defined]
        warn = rank_zero_info if later else rank_zero_warn
        for optimizer in trainer.optimizers:
            self.limits.append(
                LimitedSteps(optimizer, pl_module, self.ratio, self.floor, example, rank_zero_info, warn, self._new)
            )

    def look_again(self, trainer: pl.Trainer) -> None:
        """Find anew which convolutions are bounded, after layers were frozen or brought to life in the training."""
        for limit, optimizer in zip(self.limits, trainer.optimizers, strict=False):
            limit.look_again(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        limits = [limit for limit in self.limits if limit.limited] or self.limits[:1]
        shares = [share.to(pl_module.device) for limit in limits if (share := limit.share) is not None]
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
