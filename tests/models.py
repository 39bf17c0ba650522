"""Tiny networks that hold BatchNorm the ways it goes wrong, each with an input that it takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm of `model` values as after pretraining, and return the model."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor, low: float, high: float) -> None:
        values = torch.rand(tensor.shape, generator=generator) * (high - low) + low
        tensor.detach().copy_(values)

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.weight is not None:
                draw(module.weight, 0.3, 1.7)
            if module.bias is not None:
                draw(module.bias, -0.5, 0.5)
            if module.running_mean is not None:
                draw(module.running_mean, -1.0, 1.0)
                draw(module.running_var, 0.2, 3.0)
                module.num_batches_tracked.fill_(7)
    return model


class Plain(nn.Module):
    """conv - BN - ReLU - conv - BN - pool - linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 8, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(8, eps=1e-3, momentum=0.01)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        return self.head(self.bn2(self.conv2(x)).mean((2, 3)))


class Block(nn.Module):
    """conv - the BN it is given."""

    def __init__(self, bn: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class Tied(nn.Module):
    """One BN under two parents, and another of its own between them."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.BatchNorm2d(4)
        self.first = Block(shared)
        self.between = nn.BatchNorm2d(4)
        self.second = Block(shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class Head1d(nn.Module):
    """A BatchNorm1d on [N, C], the neck of metric learning."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.neck = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(self.linear(x))


def with_norm(norm: nn.Module) -> nn.Module:
    """conv to four channels, then the norm layer."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm)


def norm_act() -> nn.Module:
    """timm's BatchNormAct2d with a drop layer and an activation that has weights."""
    from timm.layers import BatchNormAct2d

    layer = BatchNormAct2d(4, act_layer=nn.PReLU, drop_layer=nn.Dropout)
    with torch.no_grad():
        layer.act.weight.fill_(0.125)
    return nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 4, 1))


def without_bias() -> nn.Module:
    """BatchNorm with a weight and no bias: `bias=False` of newer torch versions."""
    norm = nn.BatchNorm2d(4)
    norm.register_parameter("bias", None)
    return with_norm(norm)


class PreActivation(nn.Module):
    """BN behind a concatenation and behind an addition, as in densenet and resnetv2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(7, 7, 3, padding=1)
        self.after_concat = nn.BatchNorm2d(7)
        self.after_add = nn.BatchNorm2d(7)
        self.after_pool = nn.BatchNorm2d(7)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.conv1(x)], 1)
        x = x + self.conv2(F.relu(self.after_concat(x)))
        return self.after_pool(self.pool(F.relu(self.after_add(x))))


class ConvTwice(nn.Module):
    """One conv, called twice, with a BN of its own behind each call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv(self.stem(x))))
        return self.bn2(self.conv(x))


class AsksForItsType(nn.Module):
    """Its forward looks at the class of `bn2`, and doubles what comes out of anything but a BatchNorm2d."""

    def __init__(self) -> None:
        super().__init__()
        # Defined in another order than they are called.
        self.bn3 = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv(x))
        x = self.bn2(x) if isinstance(self.bn2, nn.BatchNorm2d) else self.bn2(2 * x)
        return self.bn3(x)


class OwnForward(nn.BatchNorm2d):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(min=0.0)


class Named(nn.BatchNorm1d):
    """A subclass that computes the same under a name that says nothing about its dimensions."""


class Volume(nn.Module):
    """conv3d - BN3d."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 2)
        self.bn = nn.BatchNorm3d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


IMAGE = (2, 3, 9, 9)
# What every kind of affine can be applied to: a builder, and the shape of an input.
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (Plain, IMAGE),
    "tied": (Tied, (2, 4, 6, 6)),
    "head1d": (Head1d, (4, 6)),
    "sequence1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (2, 3, 8)),
    "volume": (Volume, (2, 2, 4, 4, 4)),
    "norm_act": (norm_act, IMAGE),
    "momentum_none": (lambda: with_norm(nn.BatchNorm2d(4, momentum=None)), IMAGE),
    "pre_activation": (PreActivation, (2, 3, 8, 8)),
    "conv_twice": (ConvTwice, IMAGE),
    "root": (lambda: nn.BatchNorm2d(3), IMAGE),
    "sync": (lambda: with_norm(nn.SyncBatchNorm(4)), IMAGE),
    "subclass": (lambda: nn.Sequential(nn.Linear(3, 4), Named(4)), (5, 3)),
}
# What no policy but `Keep` can be applied to, and words of the reason.
UNFREEZABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no running statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), "track_running_stats=False"),
    "own forward": (lambda: OwnForward(4), "subclass with a forward of its own"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), "not initialized yet"),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Return a settled network of `NETS` and an input for it, from fixed seeds."""
    torch.manual_seed(0)
    make, shape = NETS[name]
    return settle(make()), torch.randn(shape, generator=torch.Generator().manual_seed(1))
