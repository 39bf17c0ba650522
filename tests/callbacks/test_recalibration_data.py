"""Which images a recalibration in a Trainer measures, and how they reach the network."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from finetune_bn.callbacks import BatchNormRecalibration
from finetune_bn.errors import FinetuneBNError
from finetune_bn.metric_learning.pk_sampler import PKBatchSampler
from tests.callbacks.recalibration_tools import (
    IMAGES,
    Foreign,
    Module,
    Watch,
    close,
    images,
    loader,
    of_all_images,
    same,
    statistics,
    trainer,
)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


def pk_loader() -> DataLoader[Any]:
    dataset = images()
    return DataLoader(dataset, batch_sampler=PKBatchSampler(dataset.tensors[1], 2, 3, num_batches=3))


def weighted_loader() -> DataLoader[Any]:
    return DataLoader(images(), 4, sampler=WeightedRandomSampler(torch.arange(IMAGES) + 1.0, 16))


@pytest.mark.parametrize("make", [pk_loader, weighted_loader])
def test_by_default_it_is_the_whole_training_set_whatever_sampler_training_uses(make: Any, tmp_path: Path) -> None:
    model, callback = Foreign(), BatchNormRecalibration()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, callback).fit(model, make(), loader(6))
    assert close(statistics(model), of_all_images(model))
    assert callback.record is not None
    assert callback.record.images == IMAGES
    assert not any("i.i.d" in str(w.message) for w in caught)


def test_a_loader_of_ones_own_is_taken_as_it_is(tmp_path: Path) -> None:
    other = images(20, seed=7, shift=-3.0)
    model, callback = Foreign(), BatchNormRecalibration(data=DataLoader(other, 5))
    trainer(tmp_path, callback).fit(model, loader(), loader(6))
    assert close(statistics(model), of_all_images(model, other))


def test_a_data_module_of_ones_own_is_prepared_once_and_its_training_set_taken(tmp_path: Path) -> None:
    data = Module(24)
    model, callback = Foreign(), BatchNormRecalibration(data=data)
    trainer(tmp_path, callback).fit(model, loader(), loader(6))
    assert data.calls == {"prepare": 1, "fit": 1}
    assert close(statistics(model), of_all_images(model, images(24)))
    model, own = Foreign(), Module()
    trainer(tmp_path, BatchNormRecalibration()).fit(model, datamodule=own)
    assert close(statistics(model), of_all_images(model))


def test_a_data_module_that_has_an_iid_loader_is_asked_for_it(tmp_path: Path) -> None:
    class Ours(Module):
        def iid_dataloader(self, stage: str = "train") -> DataLoader[Any]:
            assert stage == "train"
            return DataLoader(images(16, seed=5), 4)

    model = Foreign()
    trainer(tmp_path, BatchNormRecalibration()).fit(model, datamodule=Ours())
    assert close(statistics(model), of_all_images(model, images(16, seed=5)))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from images()


def test_an_iterable_data_set_is_taken_in_its_order_and_that_is_said_once(tmp_path: Path) -> None:
    model = Foreign()
    with pytest.warns(UserWarning, match="Stream is an IterableDataset, which cannot be shuffled"):
        trainer(tmp_path, BatchNormRecalibration()).fit(model, DataLoader(Stream(), 6), loader(6))
    assert close(statistics(model), of_all_images(model))


def test_no_more_images_than_max_samples_and_always_the_same(tmp_path: Path) -> None:
    callbacks = [BatchNormRecalibration(max_samples=16) for _ in range(2)]
    models = [Foreign(), Foreign()]
    for model, callback in zip(models, callbacks, strict=True):
        trainer(tmp_path, callback, epochs=1).fit(model, loader(), loader(6))
        assert callback.record is not None
        assert callback.record.images == 16
    assert same(statistics(models[0]), statistics(models[1]))
    assert not close(statistics(models[0]), of_all_images(models[0]))


def test_a_test_drive_takes_few_images(tmp_path: Path) -> None:
    callback = BatchNormRecalibration()
    trainer(tmp_path, callback, fast_dev_run=True).fit(Foreign(), loader(200), loader(6))
    assert callback.record is not None
    assert callback.record.images == 64


def test_batches_go_through_the_modules_own_hooks(tmp_path: Path) -> None:
    class Hooked(Foreign):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch["pixels"], batch["label"]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 3 - 1, batch[1]

    def collate(items: list[Any]) -> dict[str, Tensor]:
        return {"pixels": torch.stack([x for x, _ in items]), "label": torch.stack([y for _, y in items])}

    model = Hooked()
    train, val = (DataLoader(images(n), 6, collate_fn=collate) for n in (IMAGES, 6))
    trainer(tmp_path, BatchNormRecalibration(), epochs=1).fit(model, train, val)
    pixels, labels = images().tensors
    assert close(statistics(model), of_all_images(model, TensorDataset(pixels * 3 - 1, labels)))


def test_the_precision_of_the_trainer_is_used(tmp_path: Path) -> None:
    seen = set()
    model, callback = Foreign(), BatchNormRecalibration("fit_start")
    model.net[1].register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    trainer(tmp_path, callback, precision="bf16-mixed", max_steps=1, num_sanity_val_steps=0).fit(model, loader())
    assert seen == {torch.bfloat16}
    assert model.net[1].running_mean.dtype == torch.float32


class WithoutForward(pl.LightningModule):
    """As many modules are written: the steps call a part."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Foreign()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_without_a_forward_names_the_part_that_has_one(tmp_path: Path) -> None:
    match = r"module: got None; allowed: the part whose forward .* are in \['net'\]. WithoutForward has no forward"
    with pytest.raises(FinetuneBNError, match=match):
        trainer(tmp_path, BatchNormRecalibration()).fit(WithoutForward(), loader())
    model = WithoutForward()
    trainer(tmp_path, BatchNormRecalibration(module="net"), epochs=1).fit(model, loader())
    assert close(statistics(model.net), of_all_images(model.net))
    with pytest.raises(FinetuneBNError, match=r"module: got 'nett'; .* WithoutForward; BatchNorm layers .*'net'"):
        trainer(tmp_path, BatchNormRecalibration(module="nett")).fit(WithoutForward(), loader())


def test_only_the_layers_that_the_pattern_names(tmp_path: Path) -> None:
    model = Foreign()
    before = statistics(model)
    callback = BatchNormRecalibration("test", layers="net.4")
    watch = Watch(callback, "on_test_epoch_start")
    trainer(tmp_path, callback, watch).test(model, loader(), verbose=False)
    seen = watch.seen[0][3]
    assert torch.equal(seen["net.1.running_mean"], before["net.1.running_mean"])
    assert not torch.equal(seen["net.4.running_mean"], before["net.4.running_mean"])


def test_the_figures_are_logged_with_the_validation(tmp_path: Path) -> None:
    run = trainer(tmp_path, BatchNormRecalibration(), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(Foreign(), loader(), loader(6))
    rows = (Path(str(run.log_dir)) / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    assert {"recalibration/images", "recalibration/shift", "recalibration/standard_error"} <= {*names}
    filled = [row.split(",") for row in rows[1:] if row.split(",")[names.index("recalibration/images")]]
    assert len(filled) == 2
    assert all(row[names.index("val_loss")] for row in filled)
    assert float(run.callback_metrics["recalibration/images"]) == IMAGES


@pytest.mark.parametrize(
    ("arguments", "validated"),
    [({"when": "steps", "every_n_steps": 4}, True), ({"when": "fit_start"}, True), ({}, False)],
    ids=["steps", "fit_start", "no validation"],
)
def test_the_figures_are_logged_at_any_other_time_too(
    arguments: dict[str, Any], validated: bool, tmp_path: Path
) -> None:
    run = trainer(tmp_path, BatchNormRecalibration(**arguments), epochs=1)
    run.fit(Foreign(), loader(), *([loader(6)] if validated else []))
    assert float(run.callback_metrics["recalibration/images"]) == IMAGES


def test_a_warning_is_given_once_a_run_whatever_its_numbers(tmp_path: Path) -> None:
    callback = BatchNormRecalibration(tolerance=1e-3)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path, callback, epochs=3).fit(Foreign(), loader(), loader(6))
        texts = [str(w.message) for w in caught if "standard error is" in str(w.message)]
        assert len(texts) == 1
        assert texts[0].startswith("BatchNormRecalibration: the standard error is")
