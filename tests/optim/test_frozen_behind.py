"""Which convolutions have a frozen layer behind: by a forward pass, and by the order of definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.errors import FinetuneBNError
from finetune_bn.optim.frozen_behind import frozen_behind
from tests.models import IMAGE, Plain, PreActivation, settle
from tests.tools import untouched


class Gated(nn.Module):
    """conv - BN - gate of two convolutions - conv - BN - conv: only the first and the fourth have a frozen behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1))
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = x * self.gate(x).sigmoid()
        return self.head(self.bn2(self.conv2(x)))


class LiveBetween(nn.Module):
    """A live norm layer between convolution and frozen layer takes what the convolution does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.group, self.bn = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.group(self.conv(x)))


class Parallel(nn.Module):
    """Two convolutions summed up in front of a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.bn = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.one(x) + self.two(x))


def frozen(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return fbn.convert(settle(make()), fbn.Freeze("none", fold="never"), verify=False)


X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "by_probe", "by_order"),
    [
        (Plain, {"conv1", "conv2"}, {"conv1", "conv2"}),
        (Gated, {"conv1", "conv2"}, {"conv1", "conv2"}),
        (PreActivation, {"conv1", "conv2"}, {"conv1", "conv2"}),
        (LiveBetween, set(), {"conv"}),
        (Parallel, {"one", "two"}, {"one", "two"}),
    ],
)
def test_a_forward_pass_tells_and_the_order_of_definition_where_there_is_none(
    make: Callable[[], nn.Module], by_probe: set[str], by_order: set[str]
) -> None:
    net = frozen(make)
    x = X[..., :8, :8]
    with untouched(net):
        found = frozen_behind(net, x)
    assert (found.names, found.how) == (by_probe, "by running a probe input")
    found = frozen_behind(net)
    assert found.names == by_order
    assert found.how == "by the order in which the modules are defined: no probe input"


def test_of_two_convolutions_summed_up_a_trained_one_beside_one_that_is_not_is_an_adapter() -> None:
    net = frozen(Parallel)
    net.one.requires_grad_(False)
    assert frozen_behind(net, X).names == {"one"}


def test_a_new_part_that_was_frozen_with_the_statistics_it_was_made_with_does_not_count() -> None:
    net = settle(Plain())
    net.bn2.reset_running_stats()
    for affine in ("none", "original"):
        fbn.convert(net, fbn.Freeze(affine), verify=False)
        assert frozen_behind(net, X).names == {"conv1"}
    new = fbn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), fbn.Freeze("none"), verify=False)
    assert frozen_behind(new, X).names == {"0"}  # where all of it is new, that tells nothing apart


def test_merged_layers_are_judged_by_the_statistics_they_had() -> None:
    net = settle(Plain())
    net.bn2.reset_running_stats()
    fbn.convert(net, fbn.Freeze("merged"), verify=False)
    assert frozen_behind(net, X).names == {"conv1"}


def test_frozen_layers_of_torchvision_count_too() -> None:
    ops = pytest.importorskip("torchvision.ops")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), ops.FrozenBatchNorm2d(4), nn.Conv2d(4, 2, 1))
    assert frozen_behind(net, X).names == {"0"}
    assert frozen_behind(net).names == {"0"}


def test_without_frozen_layers_there_is_nothing_to_find() -> None:
    found = frozen_behind(Plain())
    assert (found.names, found.how) == (set(), "there is no frozen layer")


def test_an_example_input_that_the_network_refuses_is_named_and_a_guessed_one_is_not_needed() -> None:
    net = frozen(Plain)
    with pytest.raises(FinetuneBNError, match="example_input: got"):
        frozen_behind(net, torch.zeros(1, 7, 2, 2))
    net.example_input_array = torch.zeros(1, 7, 2, 2)
    assert frozen_behind(net).names == {"conv1", "conv2"}


def test_every_convolution_of_a_densenet_is_found_through_its_concatenations() -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("densenet121", growth_rate=4, block_config=(2, 2), num_classes=2)
    fbn.convert(net, fbn.Freeze("none", fold="never"), verify=False)
    every = {name for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert frozen_behind(net, torch.randn(1, 3, 32, 32)).names == every
    net.pretrained_cfg = {}
    assert frozen_behind(net).names >= every - {"features.transition1.conv"}
