"""Frozen layers of torchvision, timm, detectron2 and transformers: named, converted on request, and put back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.errors import NoBatchNormMatched, UnsupportedLayer
from finetune_bn.layers import FrozenBatchNorm2d, FrozenBatchNormAct2d
from finetune_bn.layers.foreign import is_foreign_frozen, revived, why_not_revived

AFFINE = ("none", "shift", "merged", "original")


class OfDetectron(nn.Module):
    """As detectron2's FrozenBatchNorm2d: four buffers, and eps as an attribute."""

    def __init__(self, num_features: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class OfTransformers(OfDetectron):
    """As transformers' DetrFrozenBatchNorm2d: eps stands in the code of forward."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        del self.eps

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class OfMaskRCNN(OfDetectron):
    """As maskrcnn-benchmark's: no eps at all."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        del self.eps

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * self.running_var.rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class SomethingElse(OfDetectron):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def trained(model: nn.Module) -> nn.Module:
    """The model with values as after pretraining in its frozen layers."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if is_foreign_frozen(layer):
            for name, low in (("weight", 0.4), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.3)):
                layer.get_buffer(name).copy_(torch.rand(layer.get_buffer(name).shape, generator=generator) + low)
    return model.eval()


def of_torchvision() -> nn.Module:
    return torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)


def of_timm() -> nn.Module:
    return timm.layers.freeze_batch_norm_2d(timm.create_model("test_efficientnet"))  # type: ignore[no-any-return]


def within(layer: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(3, 8, 3), layer(8), nn.ReLU(), nn.Conv2d(8, 4, 3), layer(4))


NETS = {
    "torchvision": (of_torchvision, "FrozenBatchNorm2d"),
    "timm": (of_timm, "FrozenBatchNormAct2d"),
    "detectron2": (within(OfDetectron), "OfDetectron"),
    "transformers": (within(OfTransformers), "OfTransformers"),
    "maskrcnn": (within(OfMaskRCNN), "OfMaskRCNN"),
}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("net", NETS)
def test_a_rule_that_names_the_class_converts_them_and_revert_puts_them_back(net: str, affine: str) -> None:
    """airctic/icevision#32, tianzhi0549/FCOS#182: gamma and beta of a detector's frozen layers are to be trained."""
    make, kind = NETS[net]
    model = trained(make())
    before, state = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(X)
    policy = fbn.Rules([fbn.Rule(fbn.Freeze(affine), type=kind)])  # type: ignore[arg-type]
    number = sum(is_foreign_frozen(m) for m in before.values())
    assert sum(row.policy is not None for row in fbn.plan(model, policy, X).rows) == number
    fbn.convert(model, policy, example_input=X)
    new = FrozenBatchNormAct2d if net == "timm" else FrozenBatchNorm2d
    converted = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(converted) == number
    assert all(type(m) is new for m in converted)
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    learnable = {"none": 0, "shift": 1, "merged": 2, "original": 2}[affine]
    assert all(len(list(m.parameters(recurse=False))) == learnable for m in converted)
    fbn.convert(model, policy, example_input=X)  # again: the rule still finds them
    fbn.revert(model, example_input=X)
    assert dict(model.named_modules()) == before
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_what_was_trained_goes_back_into_the_foreign_layer() -> None:
    model = trained(within(OfTransformers)())
    layer = model[1]  # type: ignore[index]
    fbn.convert(model, fbn.Rules([fbn.Rule(fbn.Freeze("original"), type="OfTransformers")]), example_input=X)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X).square().mean().backward()
    optimizer.step()
    expected = model(X)
    weight = model[1].weight.detach().clone()  # type: ignore[index]
    fbn.revert(model, example_input=X)
    assert model[1] is layer  # type: ignore[index]
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=0)
    assert not layer.weight.requires_grad
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("net", ["torchvision", "timm"])
def test_keep_brings_batch_norm_back_and_revert_the_frozen_layers(net: str) -> None:
    make, kind = NETS[net]
    model = trained(make())
    before, expected = dict(model.named_modules()), model(X)
    fbn.convert(model, fbn.Rules([fbn.Rule(fbn.Keep(), type=kind)]), example_input=X)
    live = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(live) == sum(is_foreign_frozen(m) for m in before.values())
    torch.testing.assert_close(model.eval()(X), expected, rtol=1e-4, atol=1e-5)
    model.train()(X)
    assert all(m.num_batches_tracked == 1 for m in live)
    fbn.revert(model, example_input=X)
    assert dict(model.named_modules()) == before


def test_recalibrated_once_they_are_ours() -> None:
    model = trained(within(OfTransformers)())
    with pytest.raises(NoBatchNormMatched, match=r"2 layers are left alone: 1 is frozen already.*Rule\(type='OfTr"):
        fbn.recalibrate(model, torch.randn(16, 3, 12, 12))
    fbn.convert(model, fbn.Rules([fbn.Rule(fbn.Freeze("none"), type="OfTransformers")]), example_input=X)
    images = torch.randn(16, 3, 12, 12)
    fbn.recalibrate(model, images)
    mean = model[0](images).mean((0, 2, 3))  # type: ignore[index]
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-4, atol=1e-5)  # type: ignore[index]


def test_without_such_a_rule_they_are_named_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(trained(of_torchvision()), nn.BatchNorm1d(1000))
    rows = fbn.plan(model, fbn.Freeze(), X).rows
    alone = [row for row in rows if row.policy is None]
    assert len(alone) == 20
    assert all("is frozen already, a torchvision.ops.misc.FrozenBatchNorm2d" in row.reason for row in alone)
    fbn.convert(model, fbn.Freeze(), example_input=X)
    assert "20 layers are left alone (0.bn1, " in caplog.text
    with pytest.raises(NoBatchNormMatched, match=r"20 are left alone: bn1 is frozen already.*Rule\(type='FrozenBatch"):
        fbn.convert(of_torchvision(), fbn.Freeze())


def test_a_layer_that_computes_something_else_is_refused_by_name() -> None:
    model = trained(within(SomethingElse)())
    assert is_foreign_frozen(model[1])  # type: ignore[index]
    assert "not that of a BatchNorm in eval mode" in str(why_not_revived(model[1]))  # type: ignore[index]
    with pytest.raises(UnsupportedLayer, match=r"1: its forward \(.*SomethingElse\)"):
        fbn.convert(model, fbn.Rules([fbn.Rule(fbn.Freeze(), type="SomethingElse")]), example_input=X)


@pytest.mark.parametrize(("layer", "eps"), [(OfDetectron, 1e-3), (OfTransformers, 1e-5), (OfMaskRCNN, 0.0)])
def test_eps_is_the_one_that_forward_computes_with(layer: Callable[[int], nn.Module], eps: float) -> None:
    assert revived(trained(layer(8))).eps == eps


def test_layers_with_statistics_to_train_are_none() -> None:
    for layer in (nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Conv2d(3, 4, 3)):
        assert not is_foreign_frozen(layer)
