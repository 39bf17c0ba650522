"""GroupNorm inside a Trainer that somebody else wrote: fitted before the first step, saved, resumed."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("lightning.pytorch")

import lightning.pytorch as pl
from torch.utils.data import DataLoader, TensorDataset

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion, GroupNormCalibration, GroupNormDistillation, replay
from finetune_bn.conversion.export import export
from finetune_bn.errors import FinetuneBNError
from finetune_bn.layers import GroupNorm
from tests.models import settle

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


def loader(batch: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(32, 3, 6, 6, generator=generator) + torch.randn(32, 1, 1, 1, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(32) % 4), batch)


class Foreign(pl.LightningModule):
    """A LightningModule as somebody else wrote it."""

    def __init__(self, lr: float = 0.01, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = settle(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), seed
        )
        self.head = nn.Linear(6, 4)
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x).relu().mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def conversion(**arguments: Any) -> BatchNormConversion:
    return BatchNormConversion(fbn.ToGroupNorm(**{"init": "sequential", **arguments}))


def fit(module: Any, callbacks: list[Any], ckpt_path: Path | None = None, **arguments: Any) -> Any:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"} | arguments
    trainer = pl.Trainer(callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False, **options)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


def group_norms(module: nn.Module) -> list[GroupNorm]:
    return [layer for layer in module.modules() if isinstance(layer, GroupNorm)]


def test_the_network_is_fitted_before_the_first_step_as_the_function_does_it() -> None:
    module, calibration = Foreign(lr=0.0), GroupNormCalibration(max_samples=None)
    expected = fbn.convert(copy.deepcopy(module), fbn.ToGroupNorm(groups=2))
    fbn.calibrate_group_norm(expected, loader())
    fit(module, [conversion(groups=2), calibration])
    assert calibration.record is not None
    assert calibration.record.images == 32
    for mine, other in zip(group_norms(module), group_norms(expected), strict=True):
        torch.testing.assert_close(mine.weight, other.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.bias, other.bias, rtol=1e-4, atol=1e-5)


def test_the_part_named_by_module_is_fitted_and_distilled() -> None:
    module = Foreign(lr=0.0)
    calibration = GroupNormCalibration(module="net", max_samples=16)
    distillation = GroupNormDistillation(module="net", max_samples=16, lr=1e-3, blend=0.5)
    fit(module, [conversion(), calibration, distillation])
    assert calibration.record is not None
    assert distillation.record is not None
    assert calibration.record.images == distillation.record.images == 16
    assert distillation.record.loss_after < distillation.record.loss_before


def test_the_optimizer_trains_the_fitted_tensors() -> None:
    module = Foreign(lr=0.1)
    fit(module, [conversion(), GroupNormCalibration(), GroupNormDistillation(max_samples=8)])
    still = Foreign(lr=0.0)
    fit(still, [conversion(), GroupNormCalibration(), GroupNormDistillation(max_samples=8)])
    assert all(
        not torch.equal(a.weight, b.weight) for a, b in zip(group_norms(module), group_norms(still), strict=True)
    )


def test_a_checkpoint_is_resumed_and_loaded_without_fitting_again(tmp_path: Path) -> None:
    module = Foreign()
    trainer = fit(module, [conversion(groups="auto"), GroupNormCalibration()])
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)

    resumed, calibration = Foreign(lr=0.0, seed=7), GroupNormCalibration()
    fit(resumed, [conversion(groups="auto"), calibration], path, max_epochs=2)
    assert calibration.record is None
    x = torch.randn(3, 3, 6, 6)

    class Own(Foreign):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            replay(checkpoint, self)

    loaded = Own.load_from_checkpoint(path, seed=7)
    assert [a.num_groups for a in group_norms(loaded)] == [b.num_groups for b in group_norms(module)]
    torch.testing.assert_close(loaded.eval()(x), module.eval()(x))
    # The BatchNorm network of the pretraining comes back too, though the module was built from other weights.
    for mine, other in zip(group_norms(loaded), group_norms(module), strict=True):
        assert mine.source is not None
        assert other.source is not None
        assert torch.equal(mine.source.running_mean, other.source.running_mean)


def test_a_run_that_only_looks_for_faults_takes_few_images() -> None:
    calibration = GroupNormCalibration(max_samples=None)
    fit(Foreign(), [conversion(), calibration], fast_dev_run=True)
    assert calibration.record is not None
    assert calibration.record.images <= 64


@pytest.mark.parametrize("init", ["sequential", "closed_form"])
def test_sequential_without_the_callback_that_does_it_is_warned_of(init: str) -> None:
    with pytest.warns(match=".") as caught:
        fit(Foreign(), [conversion(init=init)])
    said = any("nothing fits it to images" in str(warning.message) for warning in caught)
    assert said is (init == "sequential")


def test_without_converted_layers_it_says_so_and_trains() -> None:
    with pytest.warns(match="no layer of Foreign was converted"):
        fit(Foreign(), [GroupNormCalibration()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupNormCalibration(max_samples=2), "max_samples: got 2"),
        (lambda: GroupNormCalibration(balance="yes"), "balance: got 'yes'; allowed: true or false"),
        (lambda: GroupNormDistillation(lr=-1), "lr: got -1"),
        (lambda: GroupNormDistillation(max_samples=True), "max_samples: got True"),
    ],
)
def test_a_wrong_argument_is_one_clear_error(make: Any, message: str) -> None:
    with pytest.raises(FinetuneBNError, match=message):
        make()


@pytest.mark.parametrize("kind", [".onnx", ".pt2"])
def test_what_a_callback_alone_has_trained_is_exported(tmp_path: Path, kind: str) -> None:
    if kind == ".onnx":
        pytest.importorskip("onnxruntime")
    module = Foreign()
    fit(module, [conversion(), GroupNormCalibration()])
    path, x = tmp_path / f"net{kind}", torch.randn(5, 3, 6, 6)
    export(module, path, x[:2])
    if kind == ".pt2":
        y = torch.export.load(path).module()(x)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        y = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(y, module.eval()(x), rtol=1e-4, atol=1e-5)
