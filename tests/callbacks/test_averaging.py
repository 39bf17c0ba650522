"""Weight averaging beside the callbacks: constants are exact, and an average that has not begun is told."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion, BatchNormRecalibration, TrainOnly
from finetune_bn.callbacks.averaging import keep_constants
from finetune_bn.errors import FinetuneBNError
from tests.callbacks.test_conversion import Foreign, loader, same, statistics, trainer


def test_by_lightning_alone_constants_are_rounded_and_counters_fall(tmp_path: Path) -> None:
    """What this is for: `decay * x + (1 - decay) * x` is not x."""
    model, average = fbn.convert(Foreign(), fbn.Freeze("none")), EMAWeightAveraging(decay=0.9)
    model.backbone[1].num_batches_tracked.fill_(7)
    before = statistics(model)
    trainer(tmp_path, average, epochs=3).fit(model, loader())
    after = statistics(model)
    assert not same(before, after)
    assert int(after["backbone.1.num_batches_tracked"]) < 7


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("affine", ["none", "original"])
def test_what_is_frozen_is_exact_in_the_average_and_in_what_is_saved(affine: Any, first: bool, tmp_path: Path) -> None:
    model, average = Foreign(), EMAWeightAveraging(decay=0.9)
    before = statistics(model)
    order = [average, BatchNormConversion(fbn.Freeze(affine))]
    keep = ModelCheckpoint(tmp_path, filename="saved")
    trainer(tmp_path, *(order if first else order[::-1]), keep, epochs=3).fit(model, loader(), loader())
    assert same(before, statistics(model))
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in before.items())


def test_what_is_not_trained_is_exact_and_what_is_trained_is_the_average(tmp_path: Path) -> None:
    start, model, average = Foreign(), Foreign(), EMAWeightAveraging(decay=0.9)
    callbacks = [BatchNormConversion(fbn.Freeze("original")), TrainOnly(), average]
    trainer(tmp_path, *callbacks, epochs=2).fit(model, loader())
    assert torch.equal(model.backbone[0].weight, start.backbone[0].weight)
    assert not torch.equal(model.head.weight, start.head.weight)
    # The rule is Lightning's own: an average by hand, step by step, of all that is trained.
    mine, theirs = torch.rand(5), torch.rand(5)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(mine.clone())
    copied = torch.optim.swa_utils.AveragedModel(module, avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.6))
    holder = EMAWeightAveraging(decay=0.9)
    holder._average_model = copied
    for _ in range(2):
        keep_constants([holder], module)  # type: ignore[arg-type]
    copied.update_parameters(module)
    module.weight.data = theirs.clone()
    copied.update_parameters(module)
    torch.testing.assert_close(copied.module.weight.detach(), 0.6 * mine + 0.4 * theirs)


@pytest.mark.parametrize("callback", [BatchNormConversion, BatchNormRecalibration])
def test_an_average_that_would_never_begin_is_an_error_before_the_first_step(callback: Any, tmp_path: Path) -> None:
    # Lightning-AI/pytorch-lightning issue 21724: the network from before the training was validated, and saved.
    average = EMAWeightAveraging(update_starting_at_step=8)
    with pytest.raises(FinetuneBNError, match="update_starting_at_step: got 8; allowed: a step before the last of 8"):
        trainer(tmp_path, average, callback()).fit(Foreign(), loader(), loader())


@pytest.mark.parametrize(
    ("settings", "kwargs"),
    [
        ({"update_starting_at_step": 7}, {}),
        ({"update_starting_at_step": 100, "update_starting_at_epoch": 1}, {}),
        ({"update_starting_at_step": 100}, {"fast_dev_run": True}),
    ],
)
def test_one_that_begins_in_time_is_none(settings: Any, kwargs: Any, tmp_path: Path) -> None:
    run = trainer(tmp_path, EMAWeightAveraging(**settings), BatchNormConversion(), **kwargs)
    run.fit(Foreign(), loader())
    assert run.global_step == run.max_epochs * run.num_training_batches  # to the end


def test_a_validation_of_an_average_that_has_not_begun_is_warned_of_and_a_later_one_is_not(tmp_path: Path) -> None:
    average = EMAWeightAveraging(update_starting_at_step=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, average, BatchNormConversion(), epochs=3).fit(Foreign(), loader(), loader())
    said = [str(w.message) for w in caught if "EMAWeightAveraging has not begun to average" in str(w.message)]
    assert len(said) == 1  # of the first epoch of three; not of the sanity check either
