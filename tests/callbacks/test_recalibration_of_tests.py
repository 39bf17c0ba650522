"""Statistics of the images that are tested, for the time of the test."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion, BatchNormRecalibration
from finetune_bn.errors import BadData, FinetuneBNError
from tests.callbacks.recalibration_tools import Counting, Foreign, Module, images, loader, same, statistics, trainer


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


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
