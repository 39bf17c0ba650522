"""Train with live BatchNorm first, then recalibrate and freeze for the rest of the training."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from typing_extensions import override

from finetune_bn.callbacks.averaging import check_average_begins, warn_of_idle_average
from finetune_bn.callbacks.lightning_names import AVERAGING, ddp_options, is_a
from finetune_bn.callbacks.module import broadcast_statistics, check_whole_network, part_of
from finetune_bn.callbacks.recalibration import BatchNormRecalibration
from finetune_bn.callbacks.step_limit import StepLimit
from finetune_bn.conversion.convert import convert
from finetune_bn.conversion.plan import Plan, plan
from finetune_bn.conversion.policies import Freeze, Keep, Policy, Rules, check_policy
from finetune_bn.errors import FinetuneBNError, NoBatchNormMatched, UnsupportedLayer, complaint
from finetune_bn.layers.frozen import LEARNABLE, FrozenBatchNorm
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.recalibration.bank import StatisticsBank
from finetune_bn.recalibration.record import Recalibration
from finetune_bn.utilities.checks import number

Momentum = float | Literal["auto"] | None


class BatchNormSchedule(Callback):
    """Train with live BatchNorm, and for the last part of the training with frozen one.

    In the last epochs the network then learns by the statistics that it will be evaluated by (Wu and Johnson 2021,
    section 3, who freeze for the last 20 %). At the switch the layers are recalibrated on i.i.d. training images, so
    that what is frozen is not the noise of the last batches. Optimizer and learning-rate schedule go on as they were:
    with affine=original gamma and beta are the same parameters before and after; with shift and none, what is constant
    from the switch on stays in the optimizer without a gradient, so no step and no weight decay reaches it. A
    checkpoint from either side of the switch can be resumed.

    Only live layers are switched. With the command, set `batch_norm.policy: Keep` so that there are such layers.

    Attributes:
        frozen: whether the switch has happened.
        record: what the recalibration at the switch measured.

    Args:
        frozen_fraction: Share of the training, at its end, with frozen layers. Counted in epochs, or in steps where
            max_steps ends the training earlier.
        policy: What the layers become: Freeze with affine original (the default), shift or none, or Rules with such
            policies and Keep.
        recalibrate: Measure the statistics anew at the switch; else those of the training are frozen.
        data: The images for that: a DataLoader, taken as it is, or a data module. Default: those of the training.
        max_samples: How many images are taken at most; null takes all.
        module: Attribute path of the part whose layers are switched, and whose `forward` takes the images of a batch,
            such as `net`. By default the whole LightningModule.
        momentum: Share of a new batch in the running statistics while the layers are live. auto: 10 / (batches of an
            epoch, on each device), 0.1 at most (Kornblith et al. 2019). null: what the layers have.
        seed: Decides the order of the images.
        forward: The function `(module, batch)` that passes a batch to the part for the recalibration, by its import
            path. Default: the first tensor of a batch.
    """

    def __init__(
        self,
        frozen_fraction: float = 0.2,
        policy: Policy | None = None,
        recalibrate: bool = True,
        data: DataLoader[Any] | pl.LightningDataModule | None = None,
        max_samples: int | None = 4096,
        module: str | None = None,
        momentum: Momentum = None,
        seed: int = 0,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        super().__init__()
        ends = " (for 1 use BatchNormConversion(Freeze(...)), for 0 nothing)"
        self.frozen_fraction: float = number("frozen_fraction", frozen_fraction, above=0, below=1, other=ends)
        if momentum != "auto":
            momentum = number("momentum", momentum, above=0, most=1, none=True, other=", auto")
        self.momentum: Momentum = momentum
        self.module = module
        self.policy = check_policy(Freeze("original") if policy is None else policy)
        for each in _policies(self.policy):
            if not isinstance(each, (Freeze, Keep)) or (isinstance(each, Freeze) and each.affine == "merged"):
                remedy = "merged trains parameters of its own, which no state of the optimizer fits: take original."
                allowed = "Freeze with affine original, shift or none, or Rules with these and Keep"
                raise FinetuneBNError(complaint("policy", each, allowed, remedy))
        self.recalibration: BatchNormRecalibration | None = None
        if recalibrate:
            self.recalibration = BatchNormRecalibration(
                data=data, max_samples=max_samples, module=module, seed=seed, forward=forward
            )
        elif data is not None:
            raise FinetuneBNError(complaint("data", type(data).__name__, "null with recalibrate=False"))
        self.frozen = False
        self.record: Recalibration | None = None
        self._momenta: list[tuple[nn.Module, float]] = []

    def should_freeze(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        """Tell whether the layers are to be frozen before this batch; to be overridden."""
        return progress(trainer, batch_idx) >= 1 - self.frozen_fraction - 1e-9

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.frozen = False  # the callback may have served another module before; a checkpoint will say
        self.record = None
        check_whole_network(trainer)
        averaging = [type(c).__name__ for c in trainer.callbacks if is_a(c, AVERAGING)]  # type: ignore[attr-defined]
        alike = all(isinstance(p, Keep) or p == Freeze("original") for p in _policies(self.policy))
        if averaging and not alike:
            why = f"{averaging[0]} pairs the parameters of the network with those of its copy, by their order."
            raise FinetuneBNError(complaint("policy", self.policy, "Freeze('original') beside weight averaging", why))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.frozen = state_dict["frozen"]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"frozen": self.frozen}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_average_begins(trainer)
        # Now, and not where a checkpoint is loaded: the optimizer was made, and its state restored, for live layers.
        the_plan = self._plan(pl_module)
        _check_unused(trainer, pl_module, the_plan)
        if self.frozen:
            self._freeze(trainer, pl_module)
            return
        if progress(trainer, 0) == -math.inf:
            remedy = "Set trainer.max_epochs or trainer.max_steps."
            raise FinetuneBNError(complaint("frozen_fraction", self.frozen_fraction, "a training that ends", remedy))
        if not the_plan.rows:
            if trainer.global_step and self._frozen_layers(pl_module):
                self.frozen = True  # by the fit before, in the same process
                return
            remedy = "BatchNormConversion has frozen them before? Give it policy Keep."
            allowed = "a policy that applies to live BatchNorm layers of the module"
            raise NoBatchNormMatched(complaint("policy", self.policy, allowed, remedy))
        if self.recalibration is not None:
            prefix = f"{self.module}." if self.module else ""
            self.recalibration.layers = [row.names[0].removeprefix(prefix) for row in the_plan.rows]
            self.recalibration.on_train_start(trainer, pl_module)  # looks at data and module
        self._set_momentum(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not in the midst of gradients that are added up.
        if self.frozen or batch_idx % trainer.accumulate_grad_batches or not self.should_freeze(trainer, batch_idx):
            return
        self._reset_momentum()
        part = part_of(pl_module, self.module)
        # A layer that cannot be frozen leaves the statistics as they were, too.
        with contextlib.ExitStack() as undo:
            undo.enter_context(StatisticsBank.restoring(part))
            if self.recalibration is not None:
                self.record = self.recalibration.recalibrate(trainer, pl_module)
            else:
                broadcast_statistics(part)
            layers = self._freeze(trainer, pl_module)
            undo.pop_all()
        self.frozen = True
        how = "as they are" if self.record is None else f"recalibrated on {self.record.images} images"
        rank_zero_info(
            f"BatchNormSchedule: {layers} BatchNorm layers are frozen from step {trainer.global_step} on, their "
            f"statistics {how}."
        )
        if self.record is not None:
            values = {"images": float(self.record.images), "shift": self.record.shift}
            metrics = {f"recalibration/{name}": value for name, value in values.items()}
            pl_module.log_dict(metrics, on_step=True, on_epoch=False)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        warn_of_idle_average(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.frozen:
            rank_zero_warn(
                f"BatchNormSchedule: the training ended at step {trainer.global_step} with live BatchNorm layers. They "
                f"were to be frozen for its last {self.frozen_fraction:.0%}, by max_epochs={trainer.max_epochs} and "
                f"max_steps={trainer.max_steps}, and it ended earlier, or has too few batches. Where EarlyStopping "
                "ends it, set max_epochs to what it really takes, or freeze from the start by BatchNormConversion."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._reset_momentum()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._reset_momentum()

    def _plan(self, pl_module: pl.LightningModule) -> Plan:
        """Return what will happen to the live layers, by their names in the whole module.

        Raises:
            UnsupportedLayer: to one of them it cannot.
        """
        part = part_of(pl_module, self.module)
        live = {site.names for site in find_batch_norms(part) if not isinstance(site.module, FrozenBatchNorm)}
        the_plan = plan(part, self.policy, probe=False)
        rows = [row for row in the_plan.rows if row.names in live and isinstance(row.policy, Freeze)]
        refused = [f"{row.names[0]} {row.reason}" for row in rows if row.refused]
        if refused:
            raise UnsupportedLayer(f"policy: {len(refused)} layers cannot take it: {'; '.join(refused)}")
        prefix = f"{self.module}." if self.module else ""
        named = [
            dataclasses.replace(row, names=tuple((prefix + name).rstrip(".") for name in row.names)) for row in rows
        ]
        return Plan(the_plan.model, tuple(named))

    def _freeze(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        the_plan = self._plan(pl_module)
        before = {id(p): p for p in pl_module.parameters()}
        convert(pl_module, the_plan)
        after = {id(p) for p in pl_module.parameters()}
        for key in before.keys() - after:
            before[key].grad = None  # without one, optimizers leave a parameter alone, weight decay included
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StepLimit):
                callback.look_again(trainer)
        return len(the_plan.rows)

    def _frozen_layers(self, pl_module: pl.LightningModule) -> bool:
        sites = find_batch_norms(part_of(pl_module, self.module))
        return any(isinstance(site.module, FrozenBatchNorm) for site in sites)

    def _set_momentum(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.momentum is None:
            return
        batches = trainer.num_training_batches
        if self.momentum != "auto":
            momentum = self.momentum
        elif math.isinf(batches):
            allowed = "a number, where nobody knows how many batches an epoch has"
            raise FinetuneBNError(complaint("momentum", "auto", allowed, "Or set trainer.limit_train_batches."))
        else:
            momentum = momentum_rule(int(batches))
        cumulative = []
        for site in find_batch_norms(part_of(pl_module, self.module)):
            layer = site.module
            if not isinstance(layer, _BatchNorm):
                continue
            if layer.momentum is None:
                cumulative.append(site.names[0])
                continue
            self._momenta.append((layer, layer.momentum))
            layer.momentum = momentum
        if cumulative:
            rank_zero_warn(
                f"BatchNormSchedule: {len(cumulative)} layers average cumulatively (momentum=None) and keep doing so: "
                f"{', '.join(cumulative[:4])}."
            )

    def _reset_momentum(self) -> None:
        while self._momenta:
            layer, momentum = self._momenta.pop()
            layer.momentum = momentum  # type: ignore[assignment]


def momentum_rule(batches_per_epoch: int) -> float:
    """Return BatchNorm's momentum, in torch's sense, for a fine-tuning: min(10 / batches, 0.1).

    Kornblith, Shlens and Le 2019, and SimCLR's appendix B.8, write it as a decay of max(1 - 10 / s, 0.9).

    Args:
        batches_per_epoch: s, the forward passes that one device makes in an epoch: with gradient accumulation the
            running statistics move at each of them, not once a step.
    """
    return min(10 / max(batches_per_epoch, 1), 0.1)


def progress(trainer: pl.Trainer, batch_idx: int) -> float:
    """Return the share of the training that is behind; -inf where nothing says when it ends."""
    shares = [-math.inf]
    if trainer.max_epochs not in (None, -1):
        of_epoch = batch_idx / trainer.num_training_batches  # 0 where their number is infinite
        shares.append((trainer.current_epoch + of_epoch) / max(trainer.max_epochs, 1))
    if trainer.max_steps not in (None, -1):
        shares.append(trainer.global_step / max(trainer.max_steps, 1))
    return max(shares)


def _policies(policy: Policy) -> list[Policy]:
    return [rule.policy for rule in policy.rules] if isinstance(policy, Rules) else [policy]  # type: ignore[union-attr]


def _check_unused(trainer: pl.Trainer, pl_module: pl.LightningModule, the_plan: Plan) -> None:
    """Raise where parameters will leave the network that DDP was told to expect gradients of."""
    options = ddp_options(trainer)
    if options is None or (options.get("find_unused_parameters") and not options.get("static_graph")):
        return
    for row in the_plan.rows:
        assert isinstance(row.policy, Freeze)
        layer = pl_module.get_submodule(row.names[0])
        for name in {"weight", "bias"} - set(LEARNABLE[row.policy.affine]):
            parameter = getattr(layer, name)
            if isinstance(parameter, torch.Tensor) and parameter.requires_grad:
                allowed = f"original, or Trainer(strategy='ddp_find_unused_parameters_true'): {name} gets no gradient"
                raise FinetuneBNError(complaint("policy.affine", row.policy.affine, allowed))
