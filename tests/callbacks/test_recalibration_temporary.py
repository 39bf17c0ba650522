"""Statistics for the time of a validation, and what is left when a recalibration fails."""

from __future__ import annotations

import copy
import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from finetune_bn.callbacks import BatchNormRecalibration
from finetune_bn.callbacks.recalibration import CHECKPOINT_KEY
from finetune_bn.errors import BadData, FinetuneBNError
from tests.callbacks.recalibration_tools import (
    IMAGES,
    Foreign,
    Watch,
    close,
    fitted,
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
