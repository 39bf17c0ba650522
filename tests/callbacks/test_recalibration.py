"""BatchNormRecalibration in Trainers and with LightningModules that know nothing of it."""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion, BatchNormRecalibration
from finetune_bn.callbacks.recalibration import CHECKPOINT_KEY
from finetune_bn.errors import BadData, FinetuneBNError, UnsupportedLayer
from finetune_bn.metric_learning.pk_sampler import PKBatchSampler

IMAGES = 48


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


def images(n: int = IMAGES, seed: int = 1, shift: float = 2.0) -> TensorDataset:
    """Return images of four classes that differ in brightness, sorted by class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) * 4 // n
    return TensorDataset(shift + torch.randn(n, 3, 6, 6, generator=generator) + labels[:, None, None, None], labels)


def loader(n: int = IMAGES, batch: int = 6, seed: int = 1, shift: float = 2.0) -> DataLoader[Any]:
    return DataLoader(images(n, seed, shift), batch)


class Foreign(pl.LightningModule):
    """A LightningModule as somebody else wrote it."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(5, 4)
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


class Watch(Callback):
    """Writes down the statistics at each hook it is told to look at, and what was recalibrated until then."""

    def __init__(self, callback: BatchNormRecalibration, *hooks: str) -> None:
        self.seen: list[tuple[str, int, int, dict[str, Tensor]]] = []
        for hook in hooks:

            def look(trainer: pl.Trainer, module: pl.LightningModule, *args: Any, hook: str = hook) -> None:
                if not trainer.sanity_checking:
                    self.seen.append((hook, trainer.current_epoch, trainer.global_step, statistics(module)))

            setattr(self, hook, look)


class Counting(BatchNormRecalibration):
    """Writes down (epoch, step) of each recalibration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[int, int]] = []

    def recalibrate(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((trainer.current_epoch, trainer.global_step))
        return super().recalibrate(trainer, *args, **kwargs)


def trainer(folder: Path, *callbacks: Callback, epochs: int = 2, **kwargs: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if not any(isinstance(c, Checkpoint) for c in callbacks):
        quiet["enable_checkpointing"] = False
    return pl.Trainer(max_epochs=epochs, default_root_dir=folder, callbacks=list(callbacks), **quiet | kwargs)


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items() if "running" in k}


def of_all_images(module: nn.Module, dataset: TensorDataset | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """Return the statistics that the module should have: those of the whole data set."""
    twin = copy.deepcopy(module)
    fbn.recalibrate(twin, [(dataset or images()).tensors[0]], **kwargs)
    return statistics(twin)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-5) for k in a)


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


# ---- when


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


# ---- on which images


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


class Module(pl.LightningDataModule):
    """A data module that knows nothing of this package."""

    def __init__(self, n: int = IMAGES) -> None:
        super().__init__()
        self.n, self.calls = n, Counter[str]()

    def prepare_data(self) -> None:
        self.calls["prepare"] += 1

    def setup(self, stage: str) -> None:
        self.calls[stage] += 1
        self.images = images(self.n)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.images, 6)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.images, 6)


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


# ---- as the module has it


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


# ---- temporary


def fitted(folder: Path, *callbacks: Callback, epochs: int = 2, **kwargs: Any) -> Foreign:
    """Return a module that was trained with random numbers: a shuffled loader and dropout."""
    model = Foreign()
    model.net[5] = nn.Dropout(0.2)
    torch.manual_seed(3)
    trainer(folder, *callbacks, epochs=epochs, **kwargs).fit(model, DataLoader(images(), 6, shuffle=True), loader(6))
    return model


def test_temporary_statistics_leave_the_training_bit_for_bit_as_it_is_without_them(tmp_path: Path) -> None:
    plain, model = fitted(tmp_path), fitted(tmp_path, BatchNormRecalibration(temporary=True))
    assert same(dict(model.state_dict()), dict(plain.state_dict()))
    assert not same(dict(fitted(tmp_path, BatchNormRecalibration()).state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("at_epoch_end", [False, True])
def test_a_checkpoint_of_a_temporary_recalibration_holds_what_was_validated(
    at_epoch_end: bool, weights_only: bool, tmp_path: Path
) -> None:
    callback = BatchNormRecalibration(temporary=True)
    watch = Watch(callback, "on_validation_epoch_end")
    keep = ModelCheckpoint(
        tmp_path, filename="saved", save_on_train_epoch_end=at_epoch_end, save_weights_only=weights_only
    )
    model = fitted(tmp_path, callback, watch, keep, epochs=1)
    saved = load(tmp_path / "saved.ckpt")
    in_file = {k: v for k, v in saved["state_dict"].items() if "running" in k}
    assert same(in_file, watch.seen[0][3])
    assert close(in_file, of_all_images(model))
    assert not close(in_file, statistics(model))
    if not weights_only:
        of_training = saved[CHECKPOINT_KEY]["of_training"]
        assert same({k: v for k, v in of_training.items() if "running" in k}, statistics(model))


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_such_a_checkpoint_is_evaluated_with_what_was_validated(verb: str, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="saved")
    fitted(tmp_path, BatchNormRecalibration(temporary=True), keep, epochs=1)
    model, path = Foreign(), tmp_path / "saved.ckpt"
    model.net[5] = nn.Dropout(0.2)
    getattr(trainer(tmp_path, BatchNormRecalibration(temporary=True)), verb)(model, loader(), ckpt_path=path)
    assert same(dict(model.state_dict()), load(path)["state_dict"])


def test_a_checkpoint_of_a_step_holds_the_statistics_of_the_training(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=12, save_top_k=-1)
    fitted(tmp_path, BatchNormRecalibration(temporary=True), keep)
    plain = fitted(tmp_path, max_steps=12)
    saved = load(tmp_path / "step=12.ckpt")
    assert saved[CHECKPOINT_KEY]["of_training"] == {}
    assert same(saved["state_dict"], dict(plain.state_dict()))


def test_resuming_from_what_was_validated_goes_on_with_the_statistics_of_the_training(tmp_path: Path) -> None:
    def fit(name: str, epochs: int, ckpt: Path | None = None) -> Foreign:
        model, callback = Foreign(), BatchNormRecalibration(temporary=True)
        keep = ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1)
        trainer(tmp_path, callback, keep, epochs=epochs).fit(model, loader(), loader(6), ckpt_path=ckpt)
        return model

    whole = fit("whole", 3)
    fit("first", 1)
    resumed = fit("second", 3, tmp_path / "first" / "epoch=0.ckpt")
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))
    of_both = [load(tmp_path / name / "epoch=2.ckpt")["state_dict"] for name in ("whole", "second")]
    assert same(*of_both)
    assert not same(of_both[0], dict(whole.state_dict()))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["validation_step", "on_validation_end"])
def test_an_exception_while_they_are_in_use_gives_the_statistics_of_the_training_back(
    where: str, error: type[BaseException], tmp_path: Path
) -> None:
    class Breaks(Foreign):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if where == "validation_step":
                raise error("third party")

        def on_validation_end(self) -> None:
            if where == "on_validation_end":
                raise error("third party")

    plain, model = Foreign(), Breaks()
    trainer(tmp_path, epochs=1, num_sanity_val_steps=0).fit(plain, loader())
    previous = signal.getsignal(signal.SIGINT)  # Lightning ignores it from its first KeyboardInterrupt on
    crash = OnExceptionCheckpoint(tmp_path, "crash")
    run = trainer(tmp_path, BatchNormRecalibration(temporary=True), crash, epochs=1, num_sanity_val_steps=0)
    try:
        with pytest.raises((RuntimeError, SystemExit)):
            run.fit(model, loader(), loader(6))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert same(statistics(model), statistics(plain))
    saved = {k: v for k, v in load(tmp_path / "crash.ckpt")["state_dict"].items() if "running" in k}
    assert same(saved, statistics(plain))


# ---- failures


class Poisoned(Dataset[Any]):
    """Raises at the third batch of four that is read after the training."""

    def __init__(self, reads: int) -> None:
        self.data, self.left = images(), reads

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk is gone")
        return self.data[int(index)]


def test_a_recalibration_that_fails_in_its_third_batch_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    plain, model = Foreign(), Foreign()
    trainer(tmp_path, epochs=1).fit(plain, DataLoader(images(), 4))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    run = trainer(tmp_path, BatchNormRecalibration(), epochs=1)
    with pytest.raises(OSError, match="the disk is gone"):
        run.fit(model, DataLoader(Poisoned(IMAGES + 11), 4))
    assert same(dict(model.state_dict()), dict(plain.state_dict()))
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not any("forward" in vars(m) for m in model.modules())


def test_nan_activations_are_an_error_that_changes_nothing(tmp_path: Path) -> None:
    bad = TensorDataset(torch.full((8, 3, 6, 6), float("nan")))
    model = Foreign()
    before = statistics(model)
    with pytest.raises(FinetuneBNError, match=r"NaN or infinite values at the input of layer 'net\.1'"):
        trainer(tmp_path, BatchNormRecalibration("fit_start", data=DataLoader(bad, 4))).fit(model, loader())
    assert same(statistics(model), before)


def test_too_few_images_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"got '6 images'; allowed: at least min_samples=8"):
        trainer(tmp_path, BatchNormRecalibration()).fit(Foreign(), loader(6))
    trainer(tmp_path, BatchNormRecalibration(min_samples=4), epochs=1).fit(Foreign(), loader(6))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"when": "train"}, "when: got 'train'; allowed: validation, steps, fit_start, test"),
        ({"every_n_epochs": 0}, "every_n_epochs: got 0; allowed: a whole number from 1 up"),
        ({"every_n_epochs": True}, "every_n_epochs: got True"),
        ({"when": "steps"}, "every_n_steps: got None; allowed: a number with when=steps"),
        ({"every_n_steps": 5}, "every_n_steps: got 5; allowed: a number with when=steps"),
        ({"temporary": True, "when": "fit_start"}, "temporary: got True; allowed: false with when=fit_start"),
        ({"temporary": True, "when": "test"}, "temporary: got True; .* gives the network its own statistics back"),
        ({"per_domain": True}, "per_domain: got True; allowed: true with when=test"),
        ({"when": "test", "how": "preserve"}, "how: got 'preserve'; .* changes nothing in a test"),
        ({"source_first": True}, "source_first: got True; allowed: true with when=test .* use how=preserve"),
        ({"mode": "fast"}, "mode: got 'fast'; allowed: auto, exact, one_pass"),
        ({"max_samples": 0}, "max_samples: got 0; allowed: a whole number from 1 up"),
        ({"prior": -1}, "prior: got -1"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(FinetuneBNError, match=match):
        BatchNormRecalibration(**arguments)


@pytest.mark.parametrize(
    ("train", "match"),
    [
        (
            {"a": loader(12), "b": loader(12)},
            r"data: got \['DataLoader', 'DataLoader'\]; allowed: one torch DataLoader",
        ),
        ([images(8).tensors], r"data: got .*Pass a DataLoader as `data`"),
    ],
    ids=["two loaders", "a list"],
)
def test_training_data_that_cannot_be_shuffled_are_refused_before_training(
    train: Any, match: str, tmp_path: Path
) -> None:
    model = Foreign()
    before = dict(copy.deepcopy(model.state_dict()))
    with pytest.raises(FinetuneBNError, match=match):
        trainer(tmp_path, BatchNormRecalibration()).fit(model, train)
    assert same(dict(model.state_dict()), before)


# ---- beside other callbacks


def test_weight_averaging_behind_it_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FinetuneBNError, match="allowed: BatchNormRecalibration behind WeightAveraging"):
        trainer(tmp_path, BatchNormRecalibration(), WeightAveraging()).fit(Foreign(), loader(), loader(6))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"temporary": True}, "temporary: got True; allowed: false, beside WeightAveraging"),
        ({"when": "steps", "every_n_steps": 1}, "when: got 'steps'; allowed: validation, beside WeightAveraging"),
    ],
)
def test_what_makes_no_sense_beside_weight_averaging_is_refused(
    arguments: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(FinetuneBNError, match=match):
        trainer(tmp_path, WeightAveraging(), BatchNormRecalibration(**arguments)).fit(Foreign(), loader(), loader(6))


def test_behind_weight_averaging_the_averaged_network_is_recalibrated_and_training_is_not_touched(
    tmp_path: Path,
) -> None:
    plain = fitted(tmp_path, WeightAveraging(), ModelCheckpoint(tmp_path, filename="plain"))
    keep = ModelCheckpoint(tmp_path, filename="saved")
    model = fitted(tmp_path, WeightAveraging(), BatchNormRecalibration(), keep)
    saved, without = load(tmp_path / "saved.ckpt"), load(tmp_path / "plain.ckpt")
    assert same(saved["current_model_state"], without["current_model_state"])
    averaged = Foreign()
    averaged.load_state_dict(saved["state_dict"])
    assert close(statistics(averaged), of_all_images(averaged))
    assert same(dict(averaged.state_dict()), dict(model.state_dict())), "the average is the result of the training"
    assert not close(statistics(averaged), statistics(plain))


def test_an_epoch_without_validation_cannot_recalibrate_the_average_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="this epoch ends without a validation"):
        trainer(tmp_path, WeightAveraging(), BatchNormRecalibration()).fit(Foreign(), loader())


def test_behind_stochastic_weight_averaging_the_average_ends_with_the_statistics_of_all_images(tmp_path: Path) -> None:
    model = Foreign()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer(tmp_path, swa, BatchNormRecalibration(), epochs=3).fit(model, loader(), loader(6))
    assert close(statistics(model), of_all_images(model))


@pytest.mark.parametrize("affine", ["none", "shift", "original", "merged"])
def test_frozen_layers_are_renormalized_for_good_or_keep_their_function(affine: Any, tmp_path: Path) -> None:
    x = images(5, seed=9).tensors[0]
    model = Foreign(lr=1e-30)
    reference = Foreign()
    fbn.recalibrate(reference, [images().tensors[0]])
    conversion = BatchNormConversion(fbn.Freeze(affine))
    trainer(tmp_path, conversion, BatchNormRecalibration("fit_start"), epochs=1).fit(model, loader())
    torch.testing.assert_close(model.eval()(x), reference.eval()(x), rtol=1e-4, atol=1e-5)
    model, plain = Foreign(lr=1e-30), Foreign()
    preserve = BatchNormRecalibration("fit_start", how="preserve")
    trainer(tmp_path, BatchNormConversion(fbn.Freeze(affine)), preserve, epochs=1).fit(model, loader())
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("affine", ["none", "merged"])
def test_crash_and_resume_with_frozen_layers_ends_where_the_uninterrupted_run_ends(affine: Any, tmp_path: Path) -> None:
    def fit(folder: Path, epochs: int, ckpt: Path | None = None) -> Foreign:
        model = Foreign(lr=0.005)
        callbacks = [BatchNormConversion(fbn.Freeze(affine)), BatchNormRecalibration()]
        keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        trainer(folder, *callbacks, keep, epochs=epochs).fit(model, loader(), loader(6), ckpt_path=ckpt)
        return model

    whole = fit(tmp_path / "whole", 3)
    fit(tmp_path / "first", 1)
    resumed = fit(tmp_path / "second", 3, tmp_path / "first" / "epoch=0.ckpt")
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_renormalizing_merged_layers_of_an_averaged_network_is_refused(tmp_path: Path) -> None:
    callbacks = [BatchNormConversion(fbn.Freeze("merged")), WeightAveraging(), BatchNormRecalibration()]
    with pytest.raises(FinetuneBNError, match="how: got 'renormalize'; allowed: preserve, for layers with affine='mer"):
        trainer(tmp_path, *callbacks).fit(Foreign(), loader(), loader(6))


def test_merged_layers_whose_statistics_are_gone_are_an_error_with_the_remedy(tmp_path: Path) -> None:
    model = Foreign()
    fbn.convert(model, fbn.Freeze("merged"))
    model.net[1]._source = model.net[4]._source = ()
    with pytest.raises(UnsupportedLayer, match="use how='preserve'"):
        trainer(tmp_path, BatchNormRecalibration("fit_start")).fit(model, loader())


# ---- tests and predictions


def shifted() -> list[DataLoader[Any]]:
    return [loader(24, seed=4, shift=-1.0), loader(32, seed=5, shift=6.0)]


class Scores(Foreign):
    """Keeps what it returned for each test image, by loader."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: dict[int, list[Tensor]] = {}

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.logits.setdefault(dataloader_idx, []).append(self(batch[0]))


def adapted(model: nn.Module, *datasets: TensorDataset) -> nn.Module:
    twin = copy.deepcopy(model).eval()
    fbn.recalibrate(twin, [torch.cat([dataset.tensors[0] for dataset in datasets])])
    return twin


def test_each_test_domain_has_statistics_of_its_own_and_the_network_gets_its_own_back(tmp_path: Path) -> None:
    model, callback = Scores(), BatchNormRecalibration("test", per_domain=True)
    before = dict(copy.deepcopy(model.state_dict()))
    run = trainer(tmp_path, callback)
    run.test(model, shifted(), verbose=False)
    for i, test in enumerate(shifted()):
        expected = adapted(model, test.dataset)(test.dataset.tensors[0])
        torch.testing.assert_close(torch.cat(model.logits[i]), expected, rtol=1e-4, atol=1e-5)
    assert same(dict(model.state_dict()), before)
    assert callback.bank is not None
    assert callback.bank.names == ("0", "1")
    assert float(run.callback_metrics["recalibration/images/1"]) == 32
    kept = [t for layers in callback.bank._domains.values() for pair in layers.values() for t in pair]
    assert not any(t.is_inference() for t in kept), "ordinary tensors, whatever mode Lightning tests in"


def test_without_per_domain_the_statistics_are_those_of_all_test_images_mixed(tmp_path: Path) -> None:
    model, callback = Scores(), BatchNormRecalibration("test")
    before = dict(copy.deepcopy(model.state_dict()))
    trainer(tmp_path, callback).test(model, shifted(), verbose=False)
    twin = adapted(model, *(test.dataset for test in shifted()))
    for i, test in enumerate(shifted()):
        torch.testing.assert_close(torch.cat(model.logits[i]), twin(test.dataset.tensors[0]), rtol=1e-4, atol=1e-5)
    assert same(dict(model.state_dict()), before)
    assert callback.bank is None


class ImagesOfBoth(pl.LightningDataModule):
    """Training images, and test images that are shifted."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(48, seed=2)

    def test_dataloader(self) -> DataLoader[Any]:
        return shifted()[1]


@pytest.mark.parametrize("affine", ["none", "merged"])
def test_a_network_that_was_fine_tuned_frozen_first_gets_the_statistics_of_its_training(
    affine: Any, tmp_path: Path
) -> None:
    """Else its function is lost: it works by the statistics of pretraining (scripts/study_shift.py, "unprepared")."""
    model = Scores()
    fbn.convert(model, fbn.Freeze(affine), verify=False)
    before = dict(copy.deepcopy(model.state_dict()))
    trainer(tmp_path, BatchNormRecalibration("test")).test(model, ImagesOfBoth(), verbose=False)
    assert same(dict(model.state_dict()), before)
    train, test = loader(48, seed=2).dataset.tensors[0], shifted()[1].dataset.tensors[0]
    twin = copy.deepcopy(model).eval()
    fbn.recalibrate(twin, [test], source=[train])
    torch.testing.assert_close(torch.cat(model.logits[0]), twin(test), rtol=1e-4, atol=1e-5)


def test_where_there_are_no_training_images_that_is_said_and_asking_for_them_is_an_error(tmp_path: Path) -> None:
    model = fbn.convert(Scores(), fbn.Freeze(), verify=False)
    with pytest.warns(UserWarning, match="no training images .* loses its function"):
        trainer(tmp_path, BatchNormRecalibration("test")).test(model, shifted(), verbose=False)
    with pytest.raises(FinetuneBNError, match="data: got"):
        trainer(tmp_path, BatchNormRecalibration("test", source_first=True)).test(model, shifted(), verbose=False)


def test_renormalizing_frozen_layers_while_they_are_fine_tuned_is_warned_of(tmp_path: Path) -> None:
    run = trainer(tmp_path, BatchNormConversion(fbn.Freeze()), BatchNormRecalibration(), epochs=1)
    with pytest.warns(UserWarning, match="2 frozen layers are renormalized in training.* Use how=preserve"):
        run.fit(Foreign(), loader(), loader(6))


def test_a_test_can_use_the_images_of_a_loader_of_ones_own(tmp_path: Path) -> None:
    model, data = Scores(), images(20, seed=8, shift=4.0)
    callback = BatchNormRecalibration("test", data=DataLoader(data, 4))
    trainer(tmp_path, callback).test(model, shifted()[0], verbose=False)
    expected = adapted(model, data)(shifted()[0].dataset.tensors[0])
    torch.testing.assert_close(torch.cat(model.logits[0]), expected, rtol=1e-4, atol=1e-5)


def test_predictions_are_made_as_tests_are(tmp_path: Path) -> None:
    model, callback = Foreign(), BatchNormRecalibration("test", per_domain=True)
    before = statistics(model)
    run = trainer(tmp_path, callback)
    predicted: Any = run.predict(model, shifted())
    for test, found in zip(shifted(), predicted, strict=True):
        expected = adapted(model, test.dataset)(test.dataset.tensors[0])
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-5)
    assert same(statistics(model), before)


def test_domains_have_the_names_that_the_data_module_gives_them(tmp_path: Path) -> None:
    class Domains(Module):
        domains = ("photo", "sketch")

        def test_dataloader(self) -> list[DataLoader[Any]]:
            return shifted()

    callback = BatchNormRecalibration("test", per_domain=True)
    run = trainer(tmp_path, callback)
    run.test(Foreign(), datamodule=Domains(), verbose=False)
    assert callback.bank is not None
    assert callback.bank.names == ("photo", "sketch")
    assert "recalibration/shift/sketch" in run.callback_metrics


@pytest.mark.parametrize("per_domain", [False, True])
def test_an_exception_in_a_test_gives_the_statistics_back(per_domain: bool, tmp_path: Path) -> None:
    class Breaks(Foreign):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            if dataloader_idx == 1:
                raise RuntimeError("third party")

    model = Breaks()
    before = statistics(model)
    with pytest.raises(RuntimeError, match="third party"):
        trainer(tmp_path, BatchNormRecalibration("test", per_domain=per_domain)).test(model, shifted(), verbose=False)
    assert same(statistics(model), before)


def test_a_domain_that_cannot_be_measured_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    model = Foreign()
    before = statistics(model)
    with pytest.raises(BadData, match="min_samples"):
        trainer(tmp_path, BatchNormRecalibration("test", per_domain=True)).test(
            model, [loader(24), loader(4)], verbose=False
        )
    assert same(statistics(model), before)


def test_a_callback_for_tests_leaves_a_training_alone_and_a_callback_for_training_a_test(tmp_path: Path) -> None:
    model, for_tests = Foreign(), Counting("test")
    plain = Foreign()
    for one, callbacks in ((model, [for_tests]), (plain, [])):
        trainer(tmp_path, *callbacks).fit(one, loader(), loader(6))
    assert for_tests.calls == []
    assert same(dict(model.state_dict()), dict(plain.state_dict()))
    for_training = Counting()
    trainer(tmp_path, for_training).test(model, loader(), verbose=False)
    assert for_training.calls == []


# ---- adapted peers


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


# ---- several processes


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
