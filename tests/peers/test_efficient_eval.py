"""What the peers' own tests ask of convolutions that work together with the BatchNorm behind them; written anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import finetune_bn as fbn
from finetune_bn.layers.sites import find_batch_norms
from tests.models import settle

LAYERS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "linear": (nn.Linear, nn.BatchNorm1d, (4, 3)),
    "conv1d": (nn.Conv1d, nn.BatchNorm1d, (4, 3, 8)),
    "conv2d": (nn.Conv2d, nn.BatchNorm2d, (4, 3, 6, 6)),
    "conv3d": (nn.Conv3d, nn.BatchNorm3d, (4, 3, 4, 4, 4)),
    "transposed 1d": (nn.ConvTranspose1d, nn.BatchNorm1d, (4, 3, 8)),
    "transposed 2d": (nn.ConvTranspose2d, nn.BatchNorm2d, (4, 3, 6, 6)),
    "transposed 3d": (nn.ConvTranspose3d, nn.BatchNorm3d, (4, 3, 4, 4, 4)),
}


class Calls(nn.Module):
    """A convolution and a BatchNorm, called in an order that is written out: `cb`, `ccb`, `cbb`, `cbcb`."""

    def __init__(self, order: str, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.order, self.conv, self.bn = order, conv, bn

    def forward(self, x: Tensor) -> Tensor:
        for letter in self.order:
            x = self.conv(x) if letter == "c" else self.bn(x)
        return x


def stepped(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output in training mode, and all tensors after a step of SGD."""
    y = model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    y.square().mean().backward()
    optimizer.step()
    return y.detach(), dict(model.state_dict())


def in_eval(model: nn.Module) -> nn.Module:
    for module in model.train().modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_and_a_step_are_those_of_batch_norm_in_eval_mode(kind: str, bias: bool) -> None:
    """torch test/inductor/test_efficient_conv_bn_eval.py::test_basic, its layers with and without bias."""
    make, norm, shape = LAYERS[kind]
    for bn in (norm(5), nn.SyncBatchNorm(5)):
        torch.manual_seed(0)
        model = settle(nn.Sequential(make(3, 5, *([] if kind == "linear" else [3]), bias=bias), bn)).train()
        x = torch.randn(shape)
        expected = stepped(in_eval(copy.deepcopy(model)), x)
        converted = fbn.convert(model, fbn.Freeze("original", fold="always"), example_input=x)
        found = stepped(converted, x)
        torch.testing.assert_close(found[0], expected[0], rtol=2e-4, atol=2e-4)
        for name, value in expected[1].items():
            torch.testing.assert_close(found[1][name], value, rtol=2e-4, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    ("order", "origin"),
    [("cbcb", "MultiUserConvOp"), ("ccb", "conv(conv(x))"), ("cbb", "bn(bn(x))"), ("cb", "conv and bn, once each")],
)
def test_what_is_called_twice_is_not_merged_and_computes_the_same_step(order: str, origin: str) -> None:
    """torch test_efficient_conv_bn_eval.py::test_basic, MultiUserConvOp; mmengine ...::test_efficient_conv_bn_eval."""
    torch.manual_seed(0)
    model = settle(Calls(order, nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))).train()
    x = torch.randn(4, 3, 6, 6)
    policy = fbn.Freeze("original", fold="always")
    merged = fbn.fold(copy.deepcopy(model), x)
    assert bool(find_batch_norms(merged)) is (order != "cb"), origin
    torch.testing.assert_close(merged(x), copy.deepcopy(model).eval()(x), rtol=2e-4, atol=2e-4)
    expected = stepped(in_eval(copy.deepcopy(model)), x)
    found = stepped(fbn.convert(model, policy, example_input=x), x)
    torch.testing.assert_close(found[0], expected[0], rtol=2e-4, atol=2e-4)
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=2e-4, atol=2e-4, msg=name)


def test_a_convolution_that_is_exchanged_later_is_the_one_that_computes() -> None:
    """mmcv tests/test_cnn/test_conv_module.py, its efficient mode: `.conv` is another one after it was turned on."""
    torch.manual_seed(0)
    model = settle(Calls("cb", nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)))
    x = torch.randn(4, 3, 6, 6)
    converted = fbn.convert(model, fbn.Freeze("merged", fold="always"), example_input=x).train()
    stepped(converted, x)  # the pair has worked together
    other = nn.Conv2d(3, 3, 1, bias=False)
    converted.conv = other
    reference = in_eval(fbn.revert(copy.deepcopy(converted), example_input=x))
    torch.testing.assert_close(converted(x), reference(x), rtol=2e-4, atol=2e-4)
    converted(x).square().mean().backward()
    reference(x).square().mean().backward()
    torch.testing.assert_close(other.weight.grad, reference.conv.weight.grad, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_merging_leaves_a_net_of_linear_maps_with_the_same_function(kind: str) -> None:
    """mmcv tests/test_cnn/test_fuse_conv_bn.py::test_fuse_conv_bn, there Conv2d alone."""
    make, norm, shape = LAYERS[kind]
    torch.manual_seed(0)
    model = settle(nn.Sequential(make(3, 5, *([] if kind == "linear" else [3])), norm(5), nn.ReLU())).eval()
    x = torch.randn(shape)
    expected = model(x)
    merged = fbn.fold(model, x)
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
    assert not find_batch_norms(merged)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("affine", ["none", "shift", "merged", "original"])
def test_an_average_of_all_buffers_over_processes_leaves_frozen_statistics_exact(affine: Any, world: int) -> None:
    """mmengine tests/test_hooks/test_sync_buffers_hook.py: it averages every buffer of each process after an epoch."""
    models = []
    for rank in range(world):
        torch.manual_seed(0)
        model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
        fbn.convert(model, fbn.Freeze(affine), example_input=torch.zeros(2, 3, 6, 6))
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(rank))
        stepped(model.train(), x)  # other images in each process
        models.append(model)
    for name, buffer in models[0].named_buffers():
        if buffer.is_floating_point():
            mean = torch.stack([dict(model.named_buffers())[name] for model in models]).mean(0)
            assert torch.equal(mean, buffer), name


def test_statistics_of_a_domain_are_chosen_by_its_name_as_adabn_does() -> None:
    """pytorch-adapt tests/layers/test_adaptive_batch_norm.py: source and target statistics beside one another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    domains = {"source": 3 + 2 * torch.randn(16, 3, 5, 5), "target": -1 + 0.5 * torch.randn(16, 3, 5, 5)}
    bank = fbn.StatisticsBank()
    for name, x in domains.items():
        with bank.restoring(model):
            fbn.recalibrate(model, [x], progress=False)
            bank.keep(name, model)
    for name, x in domains.items():
        values = x.double()
        mean, var = values.mean((0, 2, 3), keepdim=True), values.var((0, 2, 3), unbiased=True, keepdim=True)
        with bank.using(name, model):
            torch.testing.assert_close(model(x).double(), (values - mean) / (var + 1e-5).sqrt(), rtol=1e-4, atol=1e-4)
