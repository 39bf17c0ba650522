"""Short trainings of a foreign module: its optimizer and schedule in every form that Lightning takes, or a refusal."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau

from finetune_bn.callbacks.short_runs import TrainerOfCopies, optimizer_maker, training_loss, whole_steps
from finetune_bn.errors import FinetuneBNError


class Foreign(pl.LightningModule):
    """Returns what `make` makes of its optimizer and a schedule that ends at a tenth after 10 steps."""

    def __init__(self, make: Any, kind: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.make, self.kind = make, kind

    def training_step(self, batch: Any) -> Any:
        return self.weight.sum() if self.kind is None else self.kind

    def configure_optimizers(self) -> Any:
        assert isinstance(self.trainer, TrainerOfCopies)
        optimizer = torch.optim.SGD(self.parameters(), lr=float(self.trainer.estimated_stepping_batches))
        return self.make(optimizer, LinearLR(optimizer, 1.0, 0.1, 10))


def trainer(**facts: Any) -> Any:
    given: dict[str, Any] = {"max_epochs": 5, "max_steps": -1, "limit_train_batches": 1.0, "accumulate_grad_batches": 1}
    plugin = SimpleNamespace(convert_module=lambda module: module)
    return SimpleNamespace(**{**given, "precision_plugin": plugin, **facts})


def by_step(optimizer: Any, schedule: Any) -> Any:
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


FORMS = {
    "optimizer": (lambda o, s: o, None),
    "list of one": (lambda o, s: [o], None),
    "dict": (lambda o, s: {"optimizer": o}, None),
    "dict with a schedule by epoch": (lambda o, s: {"optimizer": o, "lr_scheduler": s}, 5),
    "dict with a schedule by step": (by_step, 20),
    "list of a dict": (lambda o, s: [by_step(o, s)], 20),
    "two lists": (lambda o, s: ([o], [s]), 5),
    "two lists, no schedule": (lambda o, s: ([o], []), None),
    "every second step": (lambda o, s: ([o], [{"scheduler": s, "interval": "step", "frequency": 2}]), 10),
    "plateau": (lambda o, s: {"optimizer": o, "lr_scheduler": ReduceLROnPlateau(o), "monitor": "loss"}, None),
}


@pytest.mark.parametrize("form", FORMS)
def test_optimizer_and_schedule_are_found_in_each_form_and_the_schedule_is_squeezed(form: str) -> None:
    make, whole = FORMS[form]
    module = Foreign(make)
    optimizer, schedule = optimizer_maker(trainer(), 20, False)(module, 1.0, 4)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == 20.0  # the module sees the steps of the whole training
    assert (None if schedule is None else schedule.whole) == whole  # type: ignore[attr-defined]
    if schedule is not None:
        for _ in range(4):
            optimizer.step()
            schedule.step()
        done = min(whole, 10) / 10
        assert optimizer.param_groups[0]["lr"] == pytest.approx(20 * (1 - 0.9 * done))


@pytest.mark.parametrize("form", ["dict with a schedule by epoch", "dict with a schedule by step"])
def test_a_schedule_is_left_out_where_nothing_says_when_the_training_ends(form: str) -> None:
    module = Foreign(FORMS[form][0])
    endless = trainer(max_epochs=-1)
    assert whole_steps(endless, 7) is None
    optimizer, schedule = optimizer_maker(endless, None, False)(module, 1.0, 4)
    assert schedule is None
    assert math.isinf(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda o, s: ([o], [s, s]), "got 'several schedules'; allowed: one optimizer with one schedule or none"),
        (lambda o, s: [o, o], "got 'list'; allowed: configure_optimizers that returns one optimizer of torch"),
        (lambda o, s: None, "got 'NoneType'; allowed: configure_optimizers that returns one optimizer"),
    ],
)
def test_what_is_more_than_one_optimizer_and_schedule_is_refused(make: Any, words: str) -> None:
    with pytest.raises(FinetuneBNError, match=words):
        optimizer_maker(trainer(), 20, False)(Foreign(make), 1.0, 4)


def test_a_copy_sees_the_real_trainer_but_for_the_steps() -> None:
    seen = TrainerOfCopies(trainer(max_epochs=3), 12)
    assert (seen.max_epochs, seen.estimated_stepping_batches) == (3, 12)
    with pytest.raises(AttributeError):
        _ = seen.nothing_of_the_kind


def test_the_length_of_a_training_is_its_first_end() -> None:
    assert whole_steps(trainer(max_epochs=2, accumulate_grad_batches=2), 7) == 8
    assert whole_steps(trainer(max_epochs=2, max_steps=5), 7) == 5
    assert whole_steps(trainer(max_epochs=None, max_steps=5), 7) == 5
    assert whole_steps(trainer(max_epochs=3, limit_train_batches=2), 7) == 6
    assert whole_steps(trainer(max_epochs=3, limit_train_batches=0.5), 7) == 9


def test_a_module_without_a_training_step_or_whose_step_returns_no_loss_is_refused() -> None:
    with pytest.raises(FinetuneBNError, match="allowed: a module with a training_step"):
        training_loss(pl.LightningModule())
    module = Foreign(None)
    assert torch.equal(training_loss(module)(module, None), module.weight.sum())
    for wrong in ({"accuracy": 1.0}, "no loss"):
        module = Foreign(None, wrong)
        with pytest.raises(FinetuneBNError, match=r"training_step returned \w+ and no loss"):
            training_loss(module)(module, None)
