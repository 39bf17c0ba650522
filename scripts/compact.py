"""A training study in 10 to 20 CPU seconds a cell: the pictures, networks, batches and scores that studies share.

All start from ImageNet weights. Images drawn one by one are classified (9 categories of emoji, 10 digits;
cross-entropy, accuracy); batches of 16 emoji x 2 vendors are embedded (NT-Xent, 128 numbers, Recall@1 across vendors,
of emoji that were not trained on). A learning rate is chosen on validation images by seed `CHOOSE`, which reports
nothing, on a ladder that all arms share, with a search that goes on while the best rate is at an edge. A seed sets the
split, the head and the order, for all arms alike.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from advice_pictures import Pictures, all_digits, load
from torch import Tensor, nn

import finetune_bn as fbn

CHOOSE = 100
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST_RUNGS = (3e-4, 1e-3)
# Images seen in a training, by how many there are: an epoch or more, and enough for the head to be found.
EPOCHS = {100: 10, 400: 4, 1600: 1}
CALIBRATE_ON, RECALIBRATE_ON = 256, 512
DIMENSION = 128  # of embeddings
FAMILIES = {"lite0": "tf_efficientnet_lite0", "mobilenetv2": "mobilenetv2_100"}


@dataclass(frozen=True)
class Setting:
    """One case that a user may have.

    Attributes:
        family: network.
        batch: images of a step.
        images: training images.
        pictures: `same`: emoji of one vendor, tested on others of that vendor; `other`: tested on another vendor;
            `corrupted`: of one vendor, trained and tested with inverted colors of low contrast; `digits`.
        sampler: `iid`, or `pk`: 2 images of each label.
        length: steps of a training, where they are not those by `EPOCHS`.
        side: pixels; images of 64 are enlarged to more.
        proxies: the loss of `pk` batches is proxy anchor, not NT-Xent.
    """

    family: str
    batch: int
    images: int
    pictures: str
    sampler: str = "iid"
    length: int | None = None
    side: int = 64
    proxies: bool = False

    @property
    def name(self) -> str:
        """Return how tables and rows call it."""
        name = f"{self.family} {self.sampler} {self.batch} of {self.images} {self.pictures}"
        name += "" if self.side == 64 else f" at {self.side} px"
        name += " by proxies" if self.proxies else ""
        return name if self.length is None else f"{name} in {self.length} steps"

    @property
    def steps(self) -> int:
        """Return the length of a training."""
        if self.length is not None:
            return self.length
        doubled = 2 if self.batch >= 32 else 1  # a few steps do not find a head
        return doubled * EPOCHS[self.images] * self.images // self.batch


def normalizes_by(family: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation by color that a family's weights ask for."""
    return ((0.5,) * 3,) * 2 if family == "lite0" else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@lru_cache(maxsize=2)
def pictures(setting: Setting, seed: int) -> Pictures:
    """Return the images of a setting, normalized as its weights ask."""
    mean, std = normalizes_by(setting.family)
    data = load(setting.pictures, setting.images, seed, pairs=setting.sampler == "pk", mean=mean, std=std)
    return data if setting.side == 64 else data.enlarged(setting.side)


def network(setting: Setting, seed: int) -> nn.Module:
    """Return the pretrained network with a new head."""
    data = pictures(setting, seed)
    torch.manual_seed(seed)
    outputs = DIMENSION if setting.sampler == "pk" else data.classes
    return fbn.create_backbone(FAMILIES[setting.family], "package", num_classes=outputs)


@lru_cache(maxsize=2)
def calibrated(setting: Setting, seed: int, eps: str | None) -> nn.Module:
    """Return the network before training; copy it. With `eps` converted to GroupNorm, calibrated on training images."""
    net = network(setting, seed)
    if eps is not None:
        net = fbn.convert(net, fbn.ToGroupNorm(groups=1, eps=eps), verify=False)  # type: ignore[arg-type]
        data = pictures(setting, seed)
        fbn.calibrate_group_norm(net, data.train.split(64), max_samples=CALIBRATE_ON, progress=False)
    return net.to(memory_format=torch.channels_last)


def untrained(setting: Setting, seed: int, eps: str | None = None) -> nn.Module:
    """Return a copy of the network before training, see `calibrated`."""
    return copy.deepcopy(calibrated(setting, seed, eps))


@cache
def missing(setting: Setting) -> str | None:
    """Return why a setting cannot be measured here: weights or pictures that are not installed."""
    try:
        fbn.create_backbone(FAMILIES[setting.family], "package", num_classes=0)
        if setting.pictures == "digits":
            all_digits()
    except (fbn.FinetuneBNError, ImportError) as error:
        print(f"{setting.name} is left out: {error}", file=sys.stderr)
        return str(error)
    return None


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    setting: Setting,
    seed: int,
    objective: Objective,
    before: Callable[[int, nn.Module], nn.Module] = lambda step, net: net,
    gradient: Callable[[nn.Module], None] = lambda net: None,
) -> tuple[nn.Module, float]:
    """Train a network, and return it with the loss of the last batch.

    Args:
        net: the network.
        optimizer: of its parameters.
        schedule: of the optimizer.
        setting: what is trained, and how long.
        seed: order of the images.
        objective: the loss.
        before: called with the number of each step; returns the network to go on with.
        gradient: called with the network before each step of the optimizer.
    """
    data, order = pictures(setting, seed), torch.Generator().manual_seed(seed)
    net.train()
    loss = torch.zeros(())
    for step, rows in enumerate(drawn(setting, data, order)):
        net = before(step, net)
        loss = objective(net(data.train[rows]), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        gradient(net)
        optimizer.step()
        schedule.step()
    return net, loss.item()


def drawn(setting: Setting, data: Pictures, order: torch.Generator) -> Iterator[Tensor]:
    """Yield the row numbers of each training batch."""
    done = 0
    while True:
        if setting.sampler == "pk":  # rows 2i and 2i + 1 are one label
            labels = torch.randperm(len(data.train) // 2, generator=order)
            epoch = torch.stack([2 * labels, 2 * labels + 1], 1).flatten()
        else:
            epoch = torch.randperm(len(data.train), generator=order)
        whole = len(epoch) - len(epoch) % setting.batch
        for rows in epoch[:whole].split(setting.batch):
            if done == setting.steps:
                return
            done += 1
            yield rows


class Objective(nn.Module):
    """The loss of a setting: cross-entropy, NT-Xent, or proxy anchor, whose proxies are its parameters.

    Args:
        setting: what is trained.
        seed: of the images, and of the proxies.
    """

    def __init__(self, setting: Setting, seed: int) -> None:
        super().__init__()
        self.paired = setting.sampler == "pk"
        if not self.paired:
            return
        from pytorch_metric_learning.losses import NTXentLoss, ProxyAnchorLoss

        self.labels: Tensor | None = None
        if setting.proxies:
            self.labels = pictures(setting, seed).labels.unique()
            torch.manual_seed(seed)
            self.loss = ProxyAnchorLoss(len(self.labels), DIMENSION)
        else:
            self.loss = NTXentLoss(temperature=0.1)

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch: outputs [N, C], labels [N]."""
        if not self.paired:
            return F.cross_entropy(outputs, labels)
        if self.labels is not None:  # emoji have numbers with gaps, proxies have none
            labels = torch.searchsorted(self.labels, labels)
        loss: Tensor = self.loss(F.normalize(outputs), labels)
        return loss

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the parameter groups of the proxies, with a hundred times the learning rate; none without them."""
        proxies = list(self.parameters())
        return [{"params": proxies, "lr": 100 * lr, "weight_decay": 0.0}] if proxies else []


def recalibrate(net: nn.Module, setting: Setting, seed: int) -> None:
    """Give BatchNorm the statistics of training images that are drawn one by one."""
    images = pictures(setting, seed).train
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:RECALIBRATE_ON]
    fbn.recalibrate(net, images[rows].split(max(setting.batch, 32)), progress=False)


@torch.inference_mode()
def scores(net: nn.Module, setting: Setting, seed: int) -> dict[str, float]:
    """Return accuracy, or Recall@1 across vendors, of validation and test images, in percent."""
    net.eval()
    found, data = {}, pictures(setting, seed)
    for part, images, labels in (("val", data.val, data.val_labels), ("test", data.test, data.test_labels)):
        outputs = torch.cat([net(x) for x in images.split(128)]).nan_to_num(0.0, 0.0, 0.0)
        if setting.sampler == "iid":
            hits = outputs.argmax(1) == labels
        else:
            both = F.normalize(outputs).unflatten(0, (-1, 2))
            alike = both[:, 0] @ both[:, 1].T
            right = torch.arange(len(alike))
            hits = torch.cat([alike.argmax(1) == right, alike.argmax(0) == right])
        found[part] = 100 * hits.float().mean().item()
    return found
