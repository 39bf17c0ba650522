"""A foreign LightningModule, its images, and what the tests of recalibration in a Trainer watch."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormRecalibration

IMAGES = 48


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


def fitted(folder: Path, *callbacks: Callback, epochs: int = 2, **kwargs: Any) -> Foreign:
    """Return a module that was trained with random numbers: a shuffled loader and dropout."""
    model = Foreign()
    model.net[5] = nn.Dropout(0.2)
    torch.manual_seed(3)
    trainer(folder, *callbacks, epochs=epochs, **kwargs).fit(model, DataLoader(images(), 6, shuffle=True), loader(6))
    return model
