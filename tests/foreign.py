"""Lightning modules that know nothing of this package, for the command to find by their import path."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    """Takes neither num_classes nor class_names, and has no validation."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Pooled(Net):
    """Normalizes one value a channel and image."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features[1](self.features[0](x).mean((2, 3), keepdim=True)).flatten(1))


class Counted(Net):
    """Takes num_classes alone."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes


class Late(pl.LightningModule):
    """Builds its network in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


class Broken(Net):
    """Has a fault that is not the user's."""

    def __init__(self) -> None:
        super().__init__()
        raise ZeroDivisionError("a fault in the module")


class Data(pl.LightningDataModule):
    """Knows nothing of classes."""

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8)), batch_size=4)
