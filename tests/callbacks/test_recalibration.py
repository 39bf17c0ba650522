"""BatchNormRecalibration in a training: when it happens, and what validation and checkpoint see of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from finetune_bn.callbacks import BatchNormRecalibration
from tests.callbacks.recalibration_tools import (
    Counting,
    Foreign,
    Watch,
    close,
    images,
    load,
    loader,
    of_all_images,
    same,
    statistics,
    trainer,
)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


def test_validation_metric_and_checkpoint_both_see_the_statistics_of_all_training_images(tmp_path: Path) -> None:
    model, callback = Foreign(), BatchNormRecalibration()
    watch = Watch(callback, "on_validation_epoch_start", "on_train_epoch_end")
    run = trainer(tmp_path, callback, watch, ModelCheckpoint(tmp_path, filename="last"))
    run.fit(model, loader(), loader(12, seed=2))
    expected = of_all_images(model)
    assert close(statistics(model), expected)
    assert not close(watch.seen[0][3], expected), "the weights of the first epoch are others"
    assert same(watch.seen[2][3], statistics(model))
    saved = load(tmp_path / "last.ckpt")["state_dict"]
    assert same({k: v for k, v in saved.items() if "running" in k}, statistics(model))
    x, y = images(12, seed=2).tensors
    with torch.no_grad():
        assert float(run.callback_metrics["val_loss"]) == pytest.approx(float(F.cross_entropy(model.eval()(x), y)))


def test_the_sanity_check_is_validated_with_the_statistics_that_the_network_has(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Looks(Foreign):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            seen.append(statistics(self))

    model, callback = Looks(), Counting()
    before = statistics(model)
    trainer(tmp_path, callback, epochs=1, num_sanity_val_steps=1).fit(model, loader(), loader(6))
    assert len(seen) == 2
    assert same(seen[0], before)
    assert not same(seen[1], before)
    assert callback.calls == [(0, 8)]


@pytest.mark.parametrize(("every", "epochs"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2, 3]), (9, [3])])
def test_every_so_many_epochs_and_always_in_the_last(every: int, epochs: list[int], tmp_path: Path) -> None:
    callback = Counting(every_n_epochs=every)
    trainer(tmp_path, callback, epochs=4).fit(Foreign(), loader(), loader(6))
    assert [epoch for epoch, _ in callback.calls] == epochs


def test_the_last_epoch_is_also_the_one_that_max_steps_ends(tmp_path: Path) -> None:
    callback = Counting(every_n_epochs=5)
    trainer(tmp_path, callback, epochs=-1, max_steps=8).fit(Foreign(), loader(), loader(6))
    assert callback.calls == [(0, 8)]


def test_without_validation_it_happens_at_the_end_of_the_epoch_before_the_checkpoint(tmp_path: Path) -> None:
    model, callback = Foreign(), Counting()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, callback, keep).fit(model, loader())
    assert callback.calls == [(0, 8), (1, 16)]
    saved = load(tmp_path / "epoch=1.ckpt")["state_dict"]
    assert close({k: v for k, v in saved.items() if "running" in k}, of_all_images(model))


def test_epochs_without_validation_between_others_are_not_left_out(tmp_path: Path) -> None:
    callback = Counting()
    trainer(tmp_path, callback, epochs=3, check_val_every_n_epoch=2).fit(Foreign(), loader(), loader(6))
    assert callback.calls == [(0, 8), (1, 16), (2, 24)]


def test_several_validations_in_an_epoch_are_each_of_the_weights_of_that_moment(tmp_path: Path) -> None:
    callback = Counting()
    trainer(tmp_path, callback, epochs=1, val_check_interval=3).fit(Foreign(), loader(), loader(6))
    assert callback.calls == [(0, 3), (0, 6), (0, 8)]  # the last one at the end of the epoch, for its checkpoint


@pytest.mark.parametrize(("accumulate", "steps"), [(1, [3, 6, 9, 12, 15]), (2, [3, 6])])
def test_steps_are_those_of_the_optimizer(accumulate: int, steps: list[int], tmp_path: Path) -> None:
    model, callback = Foreign(), Counting("steps", every_n_steps=3)
    trainer(tmp_path, callback, accumulate_grad_batches=accumulate).fit(model, loader(), loader(6))
    assert [step for _, step in callback.calls] == steps


def test_a_checkpoint_of_a_step_sees_the_recalibration_of_that_step(tmp_path: Path) -> None:
    callback = BatchNormRecalibration("steps", every_n_steps=4)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    model = Foreign()
    trainer(tmp_path, callback, keep, max_steps=4).fit(model, loader(), loader(6))
    saved = load(tmp_path / "step=4.ckpt")["state_dict"]
    assert close({k: v for k, v in saved.items() if "running" in k}, of_all_images(model))


def test_fit_start_is_before_the_first_step_and_not_again_on_resume(tmp_path: Path) -> None:
    model, callback = Foreign(), Counting("fit_start")
    expected = of_all_images(model)
    watch = Watch(callback, "on_train_epoch_start")
    keep = ModelCheckpoint(tmp_path, filename="saved")
    trainer(tmp_path, callback, watch, keep, epochs=1).fit(model, loader(), loader(6))
    assert close(watch.seen[0][3], expected)
    assert callback.calls == [(0, 0)]
    resumed = Counting("fit_start")
    trainer(tmp_path, resumed).fit(Foreign(), loader(), loader(6), ckpt_path=tmp_path / "saved.ckpt")
    assert resumed.calls == []


def test_validating_a_module_outside_of_fit_changes_nothing(tmp_path: Path) -> None:
    model, callback = Foreign(), Counting()
    before = statistics(model)
    trainer(tmp_path, callback).validate(model, loader(), verbose=False)
    assert callback.calls == []
    assert same(statistics(model), before)


def test_a_decision_of_ones_own_can_be_made_in_a_subclass(tmp_path: Path) -> None:
    class Late(Counting):
        def should_recalibrate(self, trainer: pl.Trainer) -> bool:
            return trainer.current_epoch == 1

    callback = Late()
    trainer(tmp_path, callback, epochs=3).fit(Foreign(), loader(), loader(6))
    assert [epoch for epoch, _ in callback.calls] == [1]
