"""`finetune-bn diagnose`: model, data, sampler, optimizer and callbacks of a config, looked at before a training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from finetune_bn.callbacks import BatchNormConversion
from finetune_bn.callbacks.lightning_names import attach_data
from finetune_bn.callbacks.module import target_of
from finetune_bn.conversion.policies import Policy
from finetune_bn.diagnosis.advise import Advice, advise
from finetune_bn.diagnosis.diagnose import Diagnosis, Finding, diagnose
from finetune_bn.diagnosis.diagnosis_page import diagnosis_page
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.files import to_json
from finetune_bn.utilities.module_state import ModuleState

_GPUS = ("gpu", "cuda")


@dataclass
class Asked:
    """What a config asks of the machine; a diagnosis runs on one device.

    Attributes:
        devices: devices that train together.
        synced: whether BatchNorm is to be synchronized over them.
        notes: what there is to say of it.
    """

    devices: int = 1
    synced: bool = False
    notes: list[Finding] = field(default_factory=list)


def on_one_device(options: Any) -> Asked:
    """Change the Trainer's options of a config so that one device that there is does it all; return what was asked.

    Args:
        options: the section `trainer`.
    """
    devices = options.devices
    count = len(devices) if isinstance(devices, (list, tuple)) else devices
    whole = int(count) if isinstance(count, int) or (isinstance(count, str) and count.isdigit()) else 1
    asked = Asked(max(1, whole) * int(options.num_nodes or 1), bool(options.sync_batchnorm))
    options.devices, options.num_nodes, options.strategy, options.sync_batchnorm = 1, 1, "auto", False
    if options.accelerator in _GPUS and not torch.cuda.is_available():
        options.accelerator = "cpu"
        sentence = "the config asks for a GPU and there is none here: this ran on the CPU, a training would not."
        asked.notes.append(Finding("device", "warning", sentence, None, "Set trainer.accelerator to auto or cpu."))
    return asked


def diagnose_config(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    datamodule: pl.LightningDataModule | None,
    conversion: BatchNormConversion,
    asked: Asked,
    **options: Any,
) -> tuple[Diagnosis, Advice]:
    """Return the diagnosis of what a config builds, and the advice.

    Args:
        trainer: the Trainer, on one device.
        model: the model.
        datamodule: the data; None takes the model's own training loader.
        conversion: the planned treatment.
        asked: what the config asks of the machine.
        options: further arguments of `diagnose`.

    Raises:
        FinetuneBNError: there is no training loader, or the model does not take its images.
    """
    loader = _training_loader(trainer, model, datamodule)
    target = target_of(model, conversion.module)
    optimizer, lr = _optimizer_of(model)
    batches = len(loader) if isinstance(loader, Sized) else None
    accumulate = int(trainer.accumulate_grad_batches)
    with _apart(model):
        found = diagnose(
            target,
            loader,
            policy=conversion.policy if isinstance(conversion.policy, Policy) else None,  # auto is decided later
            loss=_loss_of(model) if target is model else None,
            optimizer=optimizer,
            lr=lr,
            devices=asked.devices,
            sync=asked.synced,
            accumulate=accumulate,
            steps=_steps(trainer, batches, accumulate * asked.devices),
            ema=_averaging(trainer),
            notes=asked.notes,
            **options,
        )
    return found, advise(found)


def _training_loader(
    trainer: pl.Trainer, model: pl.LightningModule, datamodule: pl.LightningDataModule | None
) -> DataLoader[Any]:
    """Return the loader of the training images, made as a fit makes it."""
    trainer.strategy.connect(model)
    if datamodule is not None:
        attach_data(trainer, model, datamodule)
        datamodule.prepare_data()
        datamodule.setup("fit")
    model.setup("fit")
    model.configure_model()
    model.to(trainer.strategy.root_device)
    loader: Any = (datamodule or model).train_dataloader()
    if not isinstance(loader, DataLoader):
        given = type(loader).__name__ if loader is not None else None
        raise FinetuneBNError(complaint("train_dataloader", given, "one DataLoader of training batches"))
    return loader


def _optimizer_of(model: pl.LightningModule) -> tuple[torch.optim.Optimizer | str | None, float | None]:
    """Return the optimizer, or its name, and the learning rate, as far as the module tells."""
    name, lr = getattr(model, "optimizer_name", None), getattr(model, "lr", None)
    if isinstance(name, str) and isinstance(lr, float):
        return name, lr
    try:
        made: Any = model.configure_optimizers()
    except Exception:  # of a module that needs its Trainer for it; without one the bounds are left out
        return None, lr if isinstance(lr, float) else None
    while isinstance(made, (list, tuple)) and made:
        made = made[0]
    made = made.get("optimizer") if isinstance(made, Mapping) else made
    return (made if isinstance(made, torch.optim.Optimizer) else None), None


def _loss_of(model: pl.LightningModule) -> Callable[[nn.Module, Any], Tensor]:
    def loss(module: nn.Module, batch: Any) -> Tensor:
        output = model.training_step(batch, 0)
        found = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(found, Tensor):
            raise FinetuneBNError(complaint("training_step", type(output).__name__, "one that returns a loss"))
        return found

    return loss


def _steps(trainer: pl.Trainer, batches: int | None, together: int) -> int | None:
    """Return how many optimizer steps the training has; None where that is not known."""
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    if batches and trainer.max_epochs is not None and trainer.max_epochs > 0:
        limits.append(trainer.max_epochs * math.ceil(batches / together))
    return min(limits) if limits else None


def _averaging(trainer: pl.Trainer) -> tuple[float, int] | None:
    """Return decay and first step of averaged weights; None without, or where the average is of another kind."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            average = getattr(callback, "_kwargs", {}).get("avg_fn")
            if average is None:
                return None
            decay = float(average(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64), 1))
            return decay, int(getattr(callback, "update_starting_at_step", None) or 0)
    return None


@contextlib.contextmanager
def _apart(model: pl.LightningModule) -> Iterator[None]:
    """Take a module off its Trainer for a while: copies of it would copy that too, and nobody asked it to log."""
    state, trainer = ModuleState(model), model._trainer
    try:
        model._trainer = None
        vars(model)["log"] = vars(model)["log_dict"] = _log_nothing
        yield
    finally:
        state.restore()
        vars(model).pop("log", None)
        vars(model).pop("log_dict", None)
        model._trainer = trainer


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Take the place of `log`."""


def shown(found: Diagnosis, advice: Advice, form: str) -> str:
    """Return a diagnosis and its advice as text, JSON or a page."""
    if form == "json":
        return to_json({"diagnosis": found.to_dict(), "advice": advice.to_dict()})
    if form == "html":
        return diagnosis_page(found.to_dict(), advice.to_dict())
    return f"{found}\n\n{advice}"
