"""Short trainings of a LightningModule outside of the Trainer's loops: its loss, its optimizer, its validation."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn

from finetune_bn.callbacks.decision import set_rate
from finetune_bn.callbacks.lightning_names import overrides
from finetune_bn.comparison.training import MakeOptimizer, Scheduler
from finetune_bn.errors import FinetuneBNError, complaint

_QUIET = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "lightning.fabric")


class TrainerOfCopies:
    """What a copy of the module takes for its Trainer while it is trained for a short time: the real one, but for this.

    Args:
        trainer: the real one.
        steps: optimizer steps of the whole training.
    """

    def __init__(self, trainer: pl.Trainer, steps: float) -> None:
        self._trainer = trainer
        self.estimated_stepping_batches = steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


class Squeezed:
    """A learning-rate schedule of a whole training, run through in a short one.

    Args:
        schedule: what the module has made.
        whole: how often it is stepped in the whole training.
        steps: steps of the short one.
    """

    def __init__(self, schedule: Any, whole: int, steps: int) -> None:
        self.schedule, self.whole, self.steps = schedule, whole, steps
        self._done = self._stepped = 0

    def step(self) -> None:
        """Go on by as much of the schedule as a step of the short training is."""
        self._done += 1
        while self._stepped < round(self._done * self.whole / self.steps):
            self.schedule.step()
            self._stepped += 1


def whole_steps(trainer: pl.Trainer, batches: int) -> int | None:
    """Return the optimizer steps of a training; None where nothing says when it ends.

    Args:
        trainer: not yet training.
        batches: of an epoch.
    """
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else max(1, int(batches * limit))
    an_epoch = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    ends = [an_epoch * trainer.max_epochs] if trainer.max_epochs not in (None, -1) else []
    ends += [trainer.max_steps] if trainer.max_steps not in (None, -1) else []
    return min(ends) if ends else None


def optimizer_maker(trainer: pl.Trainer, whole: int | None, sets_rate: bool) -> MakeOptimizer:
    """Return what makes the optimizer of a copy as its own `configure_optimizers` does, its schedule squeezed.

    Args:
        trainer: the real one.
        whole: optimizer steps of the whole training.
        sets_rate: whether the module has a learning rate that can be set.
    """

    def make(model: nn.Module, lr: float, steps: int) -> tuple[torch.optim.Optimizer, Scheduler | None]:
        assert isinstance(model, pl.LightningModule)
        model.trainer = TrainerOfCopies(trainer, math.inf if whole is None else whole)  # type: ignore[assignment]
        for name in ("log", "log_dict"):
            vars(model)[name] = _ignore
        trainer.precision_plugin.convert_module(model)
        if sets_rate:
            set_rate(model, lr)
        # By the class: on the module itself callbacks may have put hooks that belong to the original.
        optimizer, entry = _one(type(model).configure_optimizers(model))
        if entry is None:
            return optimizer, None
        schedule = entry["scheduler"] if isinstance(entry, dict) else entry
        if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            return optimizer, None  # there is no plateau in a short training
        by_step = isinstance(entry, dict) and entry.get("interval", "epoch") == "step"
        times = whole if by_step else trainer.max_epochs
        if times is None or times < 0:
            return optimizer, None
        every = entry.get("frequency", 1) if isinstance(entry, dict) else 1
        return optimizer, Squeezed(schedule, max(1, int(times) // max(1, every)), steps)

    return make


def training_loss(pl_module: pl.LightningModule) -> Callable[[nn.Module, Any], Tensor]:
    """Return `(model, batch)` that calls the `training_step` of a copy.

    Raises:
        FinetuneBNError: the module steps its optimizers itself, or has no training step.
    """
    if not pl_module.automatic_optimization:
        allowed = "a module whose optimizer Lightning steps (automatic_optimization)"
        raise _refused(type(pl_module).__name__, allowed)
    if not overrides(pl_module, "training_step"):
        raise _refused(type(pl_module).__name__, "a module with a training_step")
    takes_number = len(inspect.signature(pl_module.training_step).parameters) > 1

    def loss(model: nn.Module, batch: Any) -> Tensor:
        step: Any = model.training_step
        output = step(batch, 0) if takes_number else step(batch)
        found = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(found, Tensor):
            raise FinetuneBNError(f"training_step returned {type(found).__name__} and no loss")
        return found

    return loss


def monitored(trainer: pl.Trainer) -> tuple[str, bool]:
    """Return the metric that decides, and whether more of it is better: what checkpoints or early stopping go by.

    Raises:
        FinetuneBNError: nothing is monitored.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for kind in (ModelCheckpoint, EarlyStopping):
        for callback in callbacks:
            if isinstance(callback, kind) and callback.monitor is not None:
                return callback.monitor, callback.mode == "max"
    remedy = "Add ModelCheckpoint(monitor='val_accuracy', mode='max'), with what your validation_step logs."
    raise _refused("no ModelCheckpoint or EarlyStopping with a monitor", "a metric that tells which is best", remedy)


def validation_score(
    trainer: pl.Trainer, loaders: Any, monitor: str, larger_is_better: bool
) -> Callable[[nn.Module], float]:
    """Return `(model)` that validates a copy in a Trainer of its own, and returns the metric, higher is better.

    Args:
        trainer: the real one, which gives device and precision.
        loaders: the validation loaders.
        monitor: name of the metric.
        larger_is_better: whether its sign stays.
    """
    device = trainer.strategy.root_device
    where: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    if device.type != "cpu":
        where = {"accelerator": "gpu", "devices": [device.index or 0] if device.type == "cuda" else 1}

    def score(model: nn.Module) -> float:
        assert isinstance(model, pl.LightningModule)
        for name in ("log", "log_dict"):
            vars(model).pop(name, None)
        with hushed():
            own = pl.Trainer(
                **where,
                precision=trainer.precision,
                limit_val_batches=trainer.limit_val_batches,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=trainer.default_root_dir,
            )
            found = own.validate(model, dataloaders=loaders, verbose=False)
        metrics = {name: value for row in found for name, value in row.items()}
        if monitor not in metrics:
            raise FinetuneBNError(
                complaint("monitor", monitor, f"what validation_step logs: {', '.join(metrics) or 'nothing'}")
            )
        return metrics[monitor] if larger_is_better else -metrics[monitor]

    return score


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Let a Trainer say nothing of devices and loaders, which the real one has said already."""
    loggers = [logging.getLogger(name) for name in _QUIET]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def settings_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
    """Return in words what decides about trainings beside weights and data: class, hyperparameters, precision."""
    hyperparameters = {str(k): repr(v) for k, v in copy.copy(dict(getattr(pl_module, "hparams", {}))).items()}
    kind = type(pl_module)
    return [
        f"{kind.__module__}.{kind.__qualname__}",
        repr(sorted(hyperparameters.items())),
        f"{trainer.precision}, {trainer.max_epochs}, {trainer.max_steps}, {trainer.gradient_clip_val}",
    ]


def _one(made: Any) -> tuple[torch.optim.Optimizer, Any]:
    """Return the optimizer and the schedule out of what `configure_optimizers` returns."""
    schedules: Any = None
    if isinstance(made, dict):
        made, schedules = made.get("optimizer"), made.get("lr_scheduler")
    elif isinstance(made, (list, tuple)) and len(made) == 2 and isinstance(made[0], (list, tuple)):
        made, schedules = made
    elif isinstance(made, (list, tuple)) and len(made) == 1 and isinstance(made[0], dict):
        return _one(made[0])
    if isinstance(made, (list, tuple)) and len(made) == 1:
        made = made[0]
    if isinstance(schedules, (list, tuple)):
        if len(schedules) > 1:
            raise _refused("several schedules", "one optimizer with one schedule or none")
        schedules = schedules[0] if schedules else None
    if not isinstance(made, torch.optim.Optimizer):
        raise _refused(type(made).__name__, "configure_optimizers that returns one optimizer of torch")
    return made, schedules


def _refused(given: object, allowed: str, remedy: str = "Name a policy, such as Freeze.") -> FinetuneBNError:
    return FinetuneBNError(complaint("policy auto", given, allowed, remedy))


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Take what a short training logs."""
