"""Tests of opacus in adapted form, each of its faults as a test of ours, and its per-sample gradients on our layers.

Of opacus's tests/validators: batch_norm_test.py `test_fix`, `test_fix_device`, `test_fix_bn_with_args`, and
module_validator_test.py `test_is_valid_non_learnable_bn`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finetune_bn as fbn
from finetune_bn.layers import FrozenBatchNorm, GroupNorm, GroupNormAct2d
from tests.models import norm_act, settle

pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS: dict[str, Any] = {
    "1d": nn.BatchNorm1d, "2d": nn.BatchNorm2d, "3d": nn.BatchNorm3d, "sync": nn.SyncBatchNorm
}  # fmt: skip


def to_group_norm(module: nn.Module, **arguments: Any) -> Any:
    return fbn.convert(module, fbn.ToGroupNorm(**arguments))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("channels", [4, 16, 64])
def test_fix(kind: str, channels: int) -> None:
    layer = to_group_norm(settle(LAYERS[kind](channels)))
    assert isinstance(layer, nn.GroupNorm)
    assert (layer.num_channels, layer.affine) == (channels, True)


@pytest.mark.parametrize("kind", LAYERS)
def test_fix_device(kind: str) -> None:
    """opacus makes the layer on the CPU; meta is a device that every machine has."""
    layer = to_group_norm(LAYERS[kind](4, device="meta"))
    assert {t.device.type for t in (layer.weight, layer.bias)} == {"meta"}


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_fix_bn_with_args(num_groups: int) -> None:
    assert to_group_norm(settle(nn.BatchNorm2d(16)), groups=num_groups).num_groups == num_groups
    instance = to_group_norm(settle(nn.BatchNorm2d(16)), channels_per_group=1)
    x = torch.randn(2, 16, 5, 5)
    with torch.no_grad():
        expected = F.instance_norm(x, weight=instance.weight, bias=instance.bias)
    torch.testing.assert_close(instance(x), expected)


def test_is_valid_non_learnable_bn() -> None:
    """A BatchNorm is none for privacy, trained or not: opacus passes over one whose parameters are frozen."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), settle(nn.BatchNorm2d(4)), settle(nn.BatchNorm2d(4, affine=False)))
    model.requires_grad_(False)
    assert all(isinstance(layer, GroupNorm) for layer in to_group_norm(model)[1:])


def test_eps_gamma_beta_and_dtype_are_not_dropped() -> None:
    """opacus: weight 2.0 becomes 1.0, eps 1e-3 becomes 1e-5, float64 becomes float32."""
    bn = nn.BatchNorm2d(4, eps=1e-3, dtype=torch.float64)
    bn.weight.data.fill_(2.0)
    bn.bias.data.fill_(0.5)
    layer = to_group_norm(bn)
    assert (layer.eps, layer.weight.dtype) == (1e-3, torch.float64)
    torch.testing.assert_close(layer.weight.detach(), torch.full((4,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(layer.bias.detach(), torch.full((4,), 0.5, dtype=torch.float64))


def test_timms_norm_and_activation_is_seen_and_keeps_its_activation() -> None:
    """opacus asks for the exact type: it leaves a BatchNormAct2d and calls the network valid."""
    model = settle(norm_act())
    act = model[1].act  # type: ignore[index]
    to_group_norm(model)
    assert isinstance(model[1], GroupNormAct2d)  # type: ignore[index]
    assert model[1].act is act  # type: ignore[index]


def test_features_of_a_linear_layer_are_not_zeroed() -> None:
    """opacus's issue 567: gcd(32, 4) = 4 groups on [N, 4] return zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), settle(nn.BatchNorm1d(4))).eval()
    x = torch.randn(5, 3)
    y = model(x)
    to_group_norm(model, groups=32)
    assert isinstance(model[1], FrozenBatchNorm)
    torch.testing.assert_close(model(x), y)


def test_a_layer_without_affine_has_its_statistics_kept() -> None:
    """opacus returns one without weight, so that the channels' scales are lost."""
    bn = settle(nn.BatchNorm2d(4, affine=False)).eval()
    x = torch.randn(64, 4, 8, 8) * bn.running_var.sqrt().view(-1, 1, 1) + bn.running_mean.view(-1, 1, 1)
    y, off = bn(x), to_group_norm(bn)(x)
    assert (off - y).square().mean().sqrt() < 0.3


@pytest.mark.parametrize("init", ["closed_form", "reset"])
def test_per_sample_gradients_are_those_of_one_image_at_a_time(init: Any) -> None:
    grad_sample = pytest.importorskip("opacus.grad_sample", reason="opacus is in finetune-bn[dev]")
    from opacus.validators import ModuleValidator

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.last, self.head = norm_act()[1], nn.Linear(4, 2)  # type: ignore[index]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.last(self.bn(self.conv(x)).relu()).mean((2, 3)))

    net = settle(Net())
    net.last.act, net.last.drop = nn.ReLU(), nn.Identity()
    to_group_norm(net, groups=2, init=init)
    assert not ModuleValidator.validate(net, strict=False)
    x, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 1])
    singles = []
    for i in range(3):
        net.zero_grad()
        F.cross_entropy(net(x[i : i + 1]), labels[i : i + 1]).backward()
        singles.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    net.zero_grad()
    wrapped = grad_sample.GradSampleModule(net, loss_reduction="sum")
    F.cross_entropy(wrapped(x), labels, reduction="sum").backward()
    sampled = {name.removeprefix("_module."): p.grad_sample for name, p in wrapped.named_parameters()}
    assert sampled.keys() == singles[0].keys()
    for name, per_sample in sampled.items():
        torch.testing.assert_close(per_sample, torch.stack([one[name] for one in singles]), rtol=1e-4, atol=1e-5)
