"""What several processes do to a training is said once, and nothing is said where there is nothing to say."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion
from finetune_bn.callbacks.batch_composition import warn_of_small_batches
from finetune_bn.callbacks.processes import warn_of_open_devices
from tests.models import Plain, settle


class Trainer(SimpleNamespace):
    """What is asked of a Trainer, in a run of several processes."""

    __hash__ = object.__hash__


def a_trainer(world: int, batch: int) -> Any:
    loader = DataLoader(torch.zeros(64, 1), batch)  # type: ignore[arg-type]
    return Trainer(world_size=world, train_dataloader=loader, strategy=None)


def said(*arguments: Any, by: Callable[..., None] = warn_of_small_batches) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        by(*arguments)
    return [str(warning.message) for warning in found if warning.category is UserWarning]


def live() -> nn.Module:
    return settle(Plain()).train()


def test_few_images_of_a_process_under_live_layers_are_warned_of_once() -> None:
    trainer = a_trainer(8, 4)
    (text,) = said(trainer, live())
    assert "2 live BatchNorm layers (bn1, ...) normalize by the 4 images of their own process, not by the 32" in text
    assert "those of process 0 alone" in text
    assert said(trainer, live()) == []


def test_with_enough_images_it_is_still_process_0_whose_statistics_are_saved() -> None:
    (text,) = said(a_trainer(8, 16), live())
    assert "saved are those of process 0 alone, of one in 8 images" in text
    assert "BatchNormRecalibration" in text


def test_a_config_for_one_device_that_finds_eight_is_warned_of() -> None:
    (text,) = said(8, 4, by=warn_of_open_devices)
    assert "trainer.devices is auto, and 8 devices were found" in text
    assert "(8 x 4 = 32), and an epoch has 8 times fewer steps" in text
    assert said(1, 4, by=warn_of_open_devices) == []
    assert "one process, and" in said(8, None, by=warn_of_open_devices)[0]


def test_one_process_and_layers_that_are_frozen_or_synchronized_are_no_matter_of_warning() -> None:
    assert said(a_trainer(1, 4), live()) == []
    assert said(a_trainer(8, 4), fbn.convert(live(), fbn.Freeze("none"))) == []
    assert said(a_trainer(8, 4), nn.SyncBatchNorm.convert_sync_batchnorm(live())) == []
    assert said(a_trainer(8, 4), live().eval()) == []


def test_the_conversion_callback_warns_for_any_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = live()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.net(batch).square().mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[BatchNormConversion(fbn.Keep())],
        enable_model_summary=False,
        **options,
    )
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    with pytest.warns(UserWarning, match="normalize by the 4 images of their own process, not by the 8 of all 2"):
        trainer.fit(Module(), DataLoader(torch.randn(8, 3, 9, 9), 4))  # type: ignore[arg-type]
