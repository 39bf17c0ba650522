"""The columns of the interplay matrix that are Lightning's: each fits the tiny network beside something else."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormSchedule, replay
from finetune_bn.errors import FinetuneBNError
from tests.interplay.treatments import (
    BATCH,
    NET,
    Net,
    Ran,
    State,
    Treatment,
    images,
    loader,
    plain,
    start_of,
    statistics,
)


class Module(pl.LightningModule):
    """A LightningModule as somebody else wrote it."""

    def __init__(self) -> None:
        super().__init__()
        self.build()

    def build(self) -> None:
        net = Net()
        self.backbone, self.head = net.backbone, net.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Diary(Callback):
    """Writes down the statistics after each step."""

    def __init__(self) -> None:
        self.statistics: list[State] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.statistics.append(statistics(pl_module))


def make_trainer(folder: Path, *callbacks: Callback, **kwargs: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
        "max_epochs": 2,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=list(callbacks), **quiet | kwargs)


def fit(
    treatment: Treatment,
    folder: Path,
    *others: Callback,
    module: pl.LightningModule | None = None,
    n: int = 16,
    behind: bool = False,
    **kwargs: Any,
) -> Ran:
    """Fit with the callbacks of a treatment, and others behind them (or in front), for eight steps by default."""
    module = Module() if module is None else module
    diary, own = Diary(), treatment.in_trainer(folder)
    callbacks = [*others, *own] if behind else [*own, *others]
    trainer = make_trainer(folder, *callbacks, diary, **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, treatment.loader(n), loader(n))
    ran = Ran(module, start_of(treatment), trainer, diary.statistics, [str(w.message) for w in caught])
    ran.facts |= {"steps": trainer.global_step, "images": n}
    return ran


# ---- weight averaging


def stochastic_averaging(treatment: Treatment, folder: Path) -> Ran:
    average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    ran = fit(treatment, folder, average, max_epochs=3, n=8)
    assert average.n_averaged > 0
    return ran


def averaged(treatment: Treatment, folder: Path, epochs: int, **settings: Any) -> Ran:
    """Fit beside a moving average, which stands in front where there is a recalibration."""
    average = EMAWeightAveraging(**settings)
    front = treatment.key == "recalibration"
    ran = fit(treatment, folder, average, behind=front, max_epochs=epochs, n=8)
    assert average._average_model is not None
    ran.facts["averaged"] = int(average._average_model.n_averaged)
    return ran


def moving_average(treatment: Treatment, folder: Path) -> Ran:
    ran = averaged(treatment, folder, 2, decay=0.6)
    assert ran.facts["averaged"] == ran.facts["steps"] == 4
    if treatment.key == "recalibration":
        with pytest.raises(FinetuneBNError, match="BatchNormRecalibration behind WeightAveraging"):
            fit(treatment, folder, EMAWeightAveraging())
    if treatment.key == "schedule":
        with pytest.raises(FinetuneBNError, match=r"Freeze\('original'\) beside weight averaging"):
            make_trainer(folder, BatchNormSchedule(0.5, fbn.Freeze("none")), EMAWeightAveraging()).fit(
                Module(), loader()
            )
    return ran


def average_begins_later(treatment: Treatment, folder: Path) -> Ran:
    """At the last of four steps, with a validation before."""
    ran = averaged(treatment, folder, 2, decay=0.5, update_starting_at_step=3)
    assert ran.facts["averaged"] == 1
    return ran


def average_never_begins(treatment: Treatment, folder: Path) -> Ran:
    return averaged(treatment, folder, 1, update_starting_at_step=1000)


# ---- other callbacks of Lightning


def backbone_finetuning(treatment: Treatment, folder: Path) -> Ran:
    return fit(treatment, folder, BackboneFinetuning(1, verbose=False), max_epochs=3, n=8)


class Staged(BaseFinetuning):
    """Freezes the backbone with its norm layers, and unfreezes it behind an epoch."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, train_bn=False)


def base_finetuning(treatment: Treatment, folder: Path) -> Ran:
    ran = fit(treatment, folder, Staged(), max_epochs=3, n=8)
    if treatment.live:
        ran.excused = frozenset(NET.named("weight", "bias"))
    return ran


class Scheduled(Module):
    """Has a schedule of the learning rate, which finetuning-scheduler wants."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)]


def finetuning_scheduler(treatment: Treatment, folder: Path) -> Ran:
    """The head, then each convolution with the norm layer behind it, an epoch after the other."""
    fts = pytest.importorskip("finetuning_scheduler")
    parts = (r"head\..*", r"backbone\.[34]\..*", r"backbone\.[01]\..*")
    phases = {i: {"params": [part], "max_transition_epoch": i + 1, "lr": 0.05} for i, part in enumerate(parts)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "phases.json").write_text(json.dumps(phases))  # which is YAML, too
    scheduler = fts.FinetuningScheduler(ft_schedule=str(folder / "phases.json"), epoch_transitions_only=True)
    return fit(treatment, folder, scheduler, module=Scheduled(), max_epochs=4, n=8, enable_checkpointing=True)


# ---- settings of the Trainer


def accumulation(treatment: Treatment, folder: Path) -> Ran:
    """Two batches a step, in one epoch; and the same images in one batch a step."""
    ran = fit(treatment, folder, accumulate_grad_batches=2, max_epochs=1)
    if treatment.key in ("none", "shift", "original", "merged", "keep", "ghost"):
        whole = Module()
        data = DataLoader(images(), 2 * BATCH)
        make_trainer(folder, *treatment.in_trainer(folder), max_epochs=1).fit(whole, data)
        ran.facts["apart"] = max(
            float((value.float() - plain(whole)[name].float()).abs().max()) for name, value in plain(ran.net).items()
        )
    return ran


def bf16_mixed(treatment: Treatment, folder: Path) -> Ran:
    ran = fit(treatment, folder, precision="bf16-mixed", max_epochs=1)
    ran.facts["tolerance"] = 5e-2
    return ran


def overfit_batches(treatment: Treatment, folder: Path) -> Ran:
    return fit(treatment, folder, overfit_batches=2)


def fast_dev_run(treatment: Treatment, folder: Path) -> Ran:
    ran = fit(treatment, folder, fast_dev_run=4)
    if treatment.key == "schedule":
        short = fit(treatment, folder, fast_dev_run=1)
        ran.facts["short"] = short.warnings
    return ran


class TwoOptimizers(Module):
    """Steps head and backbone by hand, each with an optimizer of its own."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        self.log("train_loss", loss)

    def configure_optimizers(self) -> Any:
        parts = ([p for p in part.parameters() if p.requires_grad] for part in (self.backbone, self.head))
        return [torch.optim.SGD(part, lr=0.05) for part in parts]


def several_optimizers(treatment: Treatment, folder: Path) -> Ran:
    return fit(treatment, folder, module=TwoOptimizers(), max_epochs=1)


# ---- the tuner


class Loads(Module):
    """Makes its loaders by itself, as the tuner wants, and writes down which callbacks there are in a search."""

    def __init__(self, treatment: Treatment) -> None:
        super().__init__()
        self.batch_size, self.lr = BATCH, 0.05
        self.treatment = treatment
        self.beside: set[str] = set()

    def train_dataloader(self) -> Any:
        return DataLoader(images(), self.batch_size) if self.batch_size != BATCH else self.treatment.loader()

    def val_dataloader(self) -> Any:
        return loader()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.beside |= {type(c).__name__ for c in self.trainer.callbacks}  # type: ignore[attr-defined]
        return super().training_step(batch, batch_idx)


def tuned(treatment: Treatment, folder: Path, tune: Callable[[Tuner, Loads], Any]) -> Ran:
    """Search, look whether all is as before, and fit."""
    module, diary = Loads(treatment), Diary()
    trainer = make_trainer(folder, *treatment.in_trainer(folder), diary, max_epochs=1)
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("always")
        tune(Tuner(trainer), module)
        start, now = start_of(treatment), plain(module)
        assert all(torch.equal(now[name], value) for name, value in start.items()), "the search left a trace"
        assert not {type(c).__name__ for c in treatment.in_trainer(folder)} & module.beside
        diary.statistics.clear()
        trainer.fit(module)
    ran = Ran(module, start, trainer, diary.statistics, [str(w.message) for w in caught])
    ran.facts["steps"] = trainer.global_step
    return ran


def lr_find(treatment: Treatment, folder: Path) -> Ran:
    return tuned(treatment, folder, lambda tuner, module: tuner.lr_find(module, num_training=4, update_attr=False))


def batch_size_finder(treatment: Treatment, folder: Path) -> Ran:
    def tune(tuner: Tuner, module: Loads) -> None:
        # What it waits for is memory of a GPU.
        with mock.patch("lightning.pytorch.tuner.batch_size_scaling.garbage_collection_cuda"):
            tuner.scale_batch_size(module, steps_per_trial=1, init_val=2, max_trials=2)
        assert module.batch_size > 2
        module.batch_size = BATCH

    return tuned(treatment, folder, tune)


# ---- checkpoints


class Replays(Module):
    """Gets the layers of its checkpoint back."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        replay(checkpoint, self)


def saved(treatment: Treatment, folder: Path) -> tuple[Ran, Path]:
    keep = ModelCheckpoint(folder, filename="saved")
    return fit(treatment, folder, keep, enable_checkpointing=True, max_epochs=1), folder / "saved.ckpt"


def outputs(net: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = net.eval()(images().tensors[0])
    return result


def without_the_callback(treatment: Treatment, folder: Path) -> Ran:
    """Test in a Trainer that has none of the callbacks: the trained module, and its checkpoint in a new one."""
    ran, path = saved(treatment, folder)
    expected, runner = outputs(ran.net), make_trainer(folder)
    runner.test(ran.net, loader(), verbose=False)
    assert torch.equal(outputs(ran.net), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for fresh in (Replays(), Module()):
            runner.test(fresh, loader(), ckpt_path=path, verbose=False)
            torch.testing.assert_close(outputs(fresh), expected)
    return ran


def load_from_checkpoint(treatment: Treatment, folder: Path) -> Ran:
    ran, path = saved(treatment, folder)
    expected = outputs(ran.net)
    for kind in (Replays, Module):
        loaded = kind.load_from_checkpoint(path, weights_only=True)
        torch.testing.assert_close(outputs(loaded), expected)
    return ran
