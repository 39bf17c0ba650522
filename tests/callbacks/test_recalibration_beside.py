"""A recalibration beside weight averaging and beside frozen layers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion, BatchNormRecalibration
from finetune_bn.errors import FinetuneBNError, UnsupportedLayer
from tests.callbacks.recalibration_tools import (
    Foreign,
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
