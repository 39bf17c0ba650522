"""The images of which a classifier is most wrong: the right ones, as they were, whatever the module returns."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from finetune_bn.callbacks.worst_images import SIDE, WorstImages

CLASSES = 3


class Answers(pl.LightningModule):
    """Its logits are the means of the three channels."""

    num_classes = CLASSES

    def __init__(self, softmax: bool = False) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.last = nn.Softmax(1) if softmax else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(x).flatten(1))


class Named(Dataset[Any]):
    """Twelve images with names."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(12, CLASSES, 4, 6, generator=generator)
        self.labels = torch.arange(12) % CLASSES
        self.names = [f"image {i}" for i in range(12)]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.images[i], self.labels[i]


def look(module: pl.LightningModule, batches: Any, most: int = 4, **facts: Any) -> tuple[list[Any], WorstImages]:
    about = {"sanity_checking": False, "world_size": 1, "datamodule": None} | facts
    trainer: Any = SimpleNamespace(**about)
    worst = WorstImages(most)
    worst.start(trainer, module)
    for number, batch in enumerate(batches):
        with torch.no_grad():
            module(batch[0])
        worst.add(batch, number, 0)
    worst.stop()
    found = worst.gathered(trainer, module, [batches], ["one"])
    assert not any(part._forward_hooks for part in module.modules())
    return found, worst


@pytest.mark.parametrize("softmax", [False, True])
def test_they_are_those_with_the_highest_loss_over_all_batches_the_worst_first(softmax: bool) -> None:
    data = Named()
    found, worst = look(Answers(softmax), DataLoader(data, batch_size=5))
    losses = F.cross_entropy(data.images.mean((2, 3)), data.labels, reduction="none")
    order = losses.argsort(descending=True)[:4].tolist()
    assert [image.loss for image in found] == pytest.approx([float(losses[i]) for i in order], rel=1e-4)
    assert [image.name for image in found] == [f"image {i}" for i in order]
    assert [image.true for image in found] == [str(i % CLASSES) for i in order]
    assert all(1 / CLASSES <= image.probability <= 1 for image in found)
    assert worst.left_out == ""


def test_a_shuffled_loader_gives_no_names() -> None:
    found, _ = look(Answers(), DataLoader(Named(), batch_size=5, shuffle=True))
    assert {image.name for image in found} == {""}


def test_the_picture_is_the_image_as_it_was_before_it_was_normalized() -> None:
    gray = torch.tensor([0.2, 0.5, 0.8]).view(1, 3, 1, 1).expand(2, 3, 64, 32)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    images = (gray - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    data = SimpleNamespace(normalization=(mean, std))
    found, _ = look(Answers(), [(images, torch.tensor([0, 1]))], datamodule=data)
    picture = Image.open(io.BytesIO(found[0].data))
    assert picture.size == (SIDE, SIDE)
    middle = picture.getpixel((SIDE // 2, SIDE // 2))
    assert middle == pytest.approx((51, 128, 204), abs=3)


def test_a_loss_that_is_not_finite_is_the_worst_and_a_label_that_is_none_is_left_out() -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images[2] = math.nan
    found, _ = look(Answers(), [(images, torch.tensor([0, -100, 1, 2]))])
    assert len(found) == 3
    assert found[0].loss > 1e38
    assert found[0].true == "1"


class Embedder(Answers):
    task_kind = "embedding"


class Unsure(Answers):
    num_classes = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("module", "batch", "words"),
    [
        (Embedder(), (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])), "is no classifier that says how many classes"),
        (Unsure(), (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])), "is no classifier that says how many classes"),
        (Answers(), (torch.zeros(2, 3, 8, 8), torch.tensor([0.5, 1.5])), "had images, labels and logits"),
        (Answers(), (torch.zeros(2, 3, 8, 8), torch.zeros(2, 2).long()), "had images, labels and logits"),
        (Answers(), (torch.zeros(2, 3, 8, 8), [0, 1]), "had images, labels and logits"),
        (Answers(), [torch.zeros(2, 3, 8, 8)], "had images, labels and logits"),
    ],
)
def test_where_there_are_none_it_is_said_why(module: Any, batch: Any, words: str) -> None:
    found, worst = look(module, [batch])
    assert found == []
    assert words in worst.left_out


def test_over_processes_each_image_is_shown_once_and_without_a_name() -> None:
    """A sampler for two processes gives the first images of 13 twice; which file it was, only their process knows."""
    twice = SimpleNamespace(all_gather=lambda tensor: torch.stack([tensor, tensor]))
    alone, _ = look(Answers(), DataLoader(Named(), batch_size=5))
    both, worst = look(Answers(), DataLoader(Named(), batch_size=5), world_size=2, strategy=twice)
    assert [(image.loss, image.data) for image in both] == [(image.loss, image.data) for image in alone[:2]]
    assert {image.name for image in both} == {""}
    assert worst.left_out == ""


def test_what_one_process_has_is_shown_where_the_other_has_nothing() -> None:
    """Each of the three tensors is gathered; the other process has losses of -inf, and zeros."""
    empty = iter([-math.inf, 0.0, 0.0])
    other = SimpleNamespace(all_gather=lambda tensor: torch.stack([torch.full_like(tensor, next(empty)), tensor]))
    alone, _ = look(Answers(), DataLoader(Named(), batch_size=5))
    found, _ = look(Answers(), DataLoader(Named(), batch_size=5), world_size=2, strategy=other)
    assert [(image.loss, image.data) for image in found] == [(image.loss, image.data) for image in alone]
    nobody = SimpleNamespace(all_gather=lambda tensor: torch.stack([tensor, tensor]))
    found, worst = look(Answers(), [], world_size=2, strategy=nobody)
    assert found == []
    assert "had images, labels and logits" in worst.left_out


def test_nothing_is_watched_where_none_were_asked_for_or_lightning_only_checks() -> None:
    batch = (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
    for most, checking in ((0, False), (4, True)):
        assert look(Answers(), [batch], most, sanity_checking=checking)[0] == []
