"""Tests of peers, adapted, and several processes."""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

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


def test_statistics_change_after_the_training_phase_and_not_in_the_test_phase(tmp_path: Path) -> None:
    """ClassyVision test/hooks_precise_batch_norm_hook_test.py::test_bn_stats."""
    callback = BatchNormRecalibration(max_samples=10)
    watch = Watch(callback, "on_train_batch_end", "on_validation_batch_end", "on_test_batch_end")
    model = Foreign()
    run = trainer(tmp_path, callback, watch, epochs=1)
    run.fit(model, loader(), loader(12))
    run.test(model, loader(12), verbose=False)
    last = {hook: found for hook, _, _, found in watch.seen}
    assert not close(last["on_train_batch_end"], statistics(model))
    assert same(last["on_validation_batch_end"], statistics(model))
    assert same(last["on_test_batch_end"], statistics(model))


@pytest.mark.parametrize("mode", ["exact", "one_pass"])
def test_training_runs_through_in_either_mode(mode: Any, tmp_path: Path) -> None:
    """ClassyVision test/hooks_precise_batch_norm_hook_test.py::test_train, there with and without cached samples."""
    callback = BatchNormRecalibration(mode=mode, max_samples=10)
    run = trainer(tmp_path, callback)
    run.fit(Foreign(), loader(), loader(12))
    assert run.state.finished
    assert callback.record is not None
    assert (callback.record.mode, callback.record.images) == (mode, 10)


class Toy(pl.LightningModule):
    """mmpretrain's example models: a linear layer and at most one norm layer."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


def toy_loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(10, 2, generator=torch.Generator().manual_seed(0))), 2)


@pytest.mark.parametrize("layers", [[nn.Linear(2, 2), nn.BatchNorm1d(2)], [nn.BatchNorm1d(2)]], ids=["both", "BN"])
def test_after_an_epoch_a_batch_norm_alone_or_behind_a_layer_has_new_statistics(
    layers: list[nn.Module], tmp_path: Path
) -> None:
    """mmpretrain tests/test_engine/test_hooks/test_precise_bn_hook.py::test_after_train_epoch, the models with BN."""
    model, callback = Toy(*copy.deepcopy(layers)), BatchNormRecalibration(max_samples=4, min_samples=4)
    trainer(tmp_path, callback, epochs=1).fit(model, toy_loader())
    assert callback.record is not None
    assert callback.record.images == 4
    assert not torch.equal(model.layers[-1].running_mean, torch.zeros(2))


@pytest.mark.parametrize("layers", [[nn.Linear(2, 2), nn.GroupNorm(1, 2)], [nn.Linear(2, 2)]], ids=["GN", "no norm"])
def test_a_model_without_batch_norm_is_trained_as_it_is_and_that_is_said_once(
    layers: list[nn.Module], tmp_path: Path
) -> None:
    """mmpretrain tests/test_engine/test_hooks/test_precise_bn_hook.py::test_after_train_epoch, the models without."""
    plain, model = Toy(*copy.deepcopy(layers)), Toy(*copy.deepcopy(layers))
    trainer(tmp_path).fit(plain, toy_loader())
    with pytest.warns(UserWarning, match="there are no BatchNorm layers in Toy, so nothing") as caught:
        trainer(tmp_path, BatchNormRecalibration()).fit(model, toy_loader())
    assert sum("no BatchNorm layers" in str(w.message) for w in caught) == 1
    assert same(dict(model.state_dict()), dict(plain.state_dict()))


def test_after_so_many_iterations(tmp_path: Path) -> None:
    """mmpretrain tests/test_engine/test_hooks/test_precise_bn_hook.py::test_after_train_iter."""
    callback = Counting("steps", every_n_steps=1, max_samples=4, min_samples=4)
    trainer(tmp_path, callback, epochs=-1, max_steps=5).fit(Toy(nn.Linear(2, 2), nn.BatchNorm1d(2)), toy_loader())
    assert [step for _, step in callback.calls] == [1, 2, 3, 4, 5]


class Diary(Callback):
    """Each rank writes what it has in the end."""

    def __init__(self, folder: Path, callback: BatchNormRecalibration) -> None:
        self.folder, self.callback = folder, callback

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        record = self.callback.record
        assert record is not None
        found = {"images": record.images, "hash": float(sum(v.double().sum() for v in statistics(pl_module).values()))}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("how", ["default", "loader"])
def test_two_processes_pool_the_statistics_of_their_parts(how: str, tmp_path: Path) -> None:
    """mmpretrain tests/test_engine/test_hooks/test_precise_bn_hook.py::test_after_train_epoch_multi_machines."""
    data = None if how == "default" else DataLoader(images(47), 5)
    model, callback = Foreign(), BatchNormRecalibration(data=data)
    run = trainer(tmp_path, callback, Diary(tmp_path, callback), epochs=1, strategy="ddp_fork", devices=2)
    run.fit(model, loader(47), loader(6))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["images"] == 47, "no image twice, also where the numbers differ"
    assert close(statistics(model), of_all_images(model, images(47)))


def test_a_process_that_is_killed_in_a_recalibration_leaves_its_last_checkpoint_as_it_was(tmp_path: Path) -> None:
    def run() -> None:
        class Fatal(Foreign):
            def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                if self.trainer.validating:
                    os.kill(os.getpid(), signal.SIGKILL)
                return batch

        keep = ModelCheckpoint(tmp_path, filename="saved", every_n_train_steps=8)
        trainer(tmp_path, BatchNormRecalibration(), keep, num_sanity_val_steps=0).fit(Fatal(), loader(), loader(6))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["saved.ckpt"]
    plain = Foreign()
    trainer(tmp_path, epochs=1).fit(plain, loader())
    assert same(load(tmp_path / "saved.ckpt")["state_dict"], dict(plain.state_dict()))
