"""Batches that a network does not take as they are: `forward=` in every callback, and said before the first epoch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import finetune_bn as fbn
from finetune_bn.callbacks import (
    BatchNormConversion,
    BatchNormRecalibration,
    BatchNormSchedule,
    GroupNormCalibration,
    GroupNormDistillation,
)
from finetune_bn.errors import FinetuneBNError
from tests.callbacks.recalibration_tools import Foreign, loader, trainer

IMAGES = 24


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


class Samples(torch.utils.data.Dataset[dict[str, Any]]):
    """Images as dicts of a form of their own: detections, whose number differs."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"pixels": torch.randn(3, 6, 6, generator=generator) + 2, "boxes": torch.rand(index % 3 + 1, 4)}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {"pixels": [s["pixels"] for s in samples], "boxes": [s["boxes"] for s in samples]}


class Detector(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 1)
        self.steps = 0

    def forward(self, pixels: list[Tensor]) -> Tensor:
        return self.head(self.net(torch.stack(pixels)).mean((2, 3)))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.steps += 1
        return F.mse_loss(self(batch["pixels"])[:, 0], torch.tensor([float(len(b)) for b in batch["boxes"]]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def by_pixels(module: nn.Module, batch: dict[str, Any]) -> Any:
    return module(batch["pixels"])


def samples(**options: Any) -> DataLoader[Any]:
    return DataLoader(Samples(), 4, collate_fn=collate, **options)


CALLBACKS = {
    "recalibration": lambda **more: BatchNormRecalibration(**more),
    "schedule": lambda **more: BatchNormSchedule(0.5, **more),
    "calibration": lambda **more: GroupNormCalibration(**more),
    "distillation": lambda **more: GroupNormDistillation(batch_size=1, **more),
}


def run(name: str, folder: Path, **more: Any) -> tuple[Detector, Any]:
    callback, model = CALLBACKS[name](**more), Detector()
    before = []
    if name in ("calibration", "distillation"):
        before = [BatchNormConversion(fbn.ToGroupNorm(groups=1))]
        model.example_input_array = [torch.randn(3, 6, 6)] * 2  # type: ignore[assignment]
    try:
        trainer(folder, *before, callback).fit(model, samples())
    except FinetuneBNError as error:
        return model, error
    return model, callback


@pytest.mark.parametrize("name", list(CALLBACKS))
def test_what_the_network_does_not_take_is_said_before_the_first_step_and_leads_to_forward(
    name: str, tmp_path: Path
) -> None:
    model, error = run(name, tmp_path)
    assert isinstance(error, FinetuneBNError)
    assert "dict with the keys pixels, boxes" in str(error)
    assert "forward=" in str(error)
    assert model.steps == 0


@pytest.mark.parametrize("name", list(CALLBACKS))
def test_with_a_forward_of_ones_own_it_runs_and_counts_images(name: str, tmp_path: Path) -> None:
    _, callback = run(name, tmp_path, forward=by_pixels)
    assert callback.record.images == IMAGES


def test_a_forward_that_fails_is_said_before_the_first_step_too(tmp_path: Path) -> None:
    model, error = run("recalibration", tmp_path, forward=lambda module, batch: module(batch["image"]))
    assert isinstance(error, FinetuneBNError)
    assert "KeyError: 'image'" in str(error)
    assert model.steps == 0


def test_the_statistics_are_those_of_all_images(tmp_path: Path) -> None:
    model, callback = run("recalibration", tmp_path, forward=by_pixels)
    x = torch.stack([Samples()[i]["pixels"] for i in range(IMAGES)])
    y = model.net[0](x).detach()
    assert callback.record.mode == "exact"
    assert torch.allclose(model.net[1].running_mean, y.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(model.net[1].running_var, y.var((0, 2, 3)), rtol=1e-4)


def test_the_trial_takes_nothing_from_the_training(tmp_path: Path) -> None:
    orders = []
    for callbacks in ([], [BatchNormRecalibration(when="steps", every_n_steps=1000)]):
        seen: list[float] = []

        class Remembers(Foreign):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                seen.append(float(batch[0].sum() + torch.rand(())))  # noqa: B023
                return super().training_step(batch, batch_idx)

        torch.manual_seed(3)
        model = Remembers()
        torch.manual_seed(4)
        data = DataLoader(loader().dataset, 6, shuffle=True)
        trainer(tmp_path, *callbacks, epochs=2).fit(model, data)
        orders.append(seen)
    assert orders[0] == orders[1]


def test_a_configuration_gives_functions_by_their_import_path() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=pl.Callback)
    for name in ("BatchNormRecalibration", "BatchNormSchedule", "GroupNormCalibration", "GroupNormDistillation"):
        path = "finetune_bn.utilities.batch_size.count_images"
        config = parser.parse_args([f"--callback=finetune_bn.callbacks.{name}", f"--callback.forward={path}"])
        callback = parser.instantiate(config).callback
        taken = callback.recalibration.forward if name == "BatchNormSchedule" else callback.forward
        assert callable(taken)
        assert taken.__name__ == "count_images"


def test_the_other_arguments_of_a_recalibration_are_those_of_its_settings() -> None:
    callback = BatchNormRecalibration(mode="one_pass", keep_batches=True, batch_size=4, prior=2)
    assert callback.settings == fbn.recalibration.settings.RecalibrationSettings(
        mode="one_pass", keep_batches=True, batch_size=4, prior=2, max_samples=4096
    )
    with pytest.raises(TypeError, match="modus"):
        BatchNormRecalibration(modus="exact")
    with pytest.raises(FinetuneBNError, match=r"max_samples: got 10\.5"):
        BatchNormRecalibration(max_samples=10.5)  # type: ignore[arg-type]
    with pytest.raises(FinetuneBNError, match=r"max_samples: got 10\.5"):
        GroupNormCalibration(max_samples=10.5)  # type: ignore[arg-type]
    with pytest.raises(FinetuneBNError, match=r"every_n_steps: got '50'"):
        BatchNormRecalibration(when="steps", every_n_steps="50")  # type: ignore[arg-type]


class Padded(Foreign):
    """Sequences whose second half is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(24, 5))


def first_half(batch: Any) -> Tensor:
    return torch.arange(6).expand(len(batch[0]), 6) < 3


def test_a_mask_can_be_given_to_the_callback(tmp_path: Path) -> None:
    x = torch.randn(IMAGES, 3, 6, generator=torch.Generator().manual_seed(0)) + 1
    x[:, :, 3:] = 0
    data = DataLoader(torch.utils.data.TensorDataset(x, torch.arange(IMAGES) % 4), 4)
    torch.manual_seed(0)
    model = Padded()
    trainer(tmp_path, BatchNormRecalibration(mask=first_half, module="net"), epochs=1).fit(model, data)
    y = model.net[0](x)[:, :, :3].detach()
    assert torch.allclose(model.net[1].running_mean, y.mean((0, 2)), atol=1e-5)
