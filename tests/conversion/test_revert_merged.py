"""What comes back of trained `merged` layers: BatchNorm with the statistics from before, the function of today."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.errors import ConversionMismatch, UnsupportedLayer
from finetune_bn.layers.statistics import statistics_of
from tests.models import Plain, settle

C = 5


def merged(mean: float = 3.0, var: float = 2.0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return a net of one BatchNorm far off zero, converted to `merged`."""
    bn = nn.BatchNorm2d(C)
    generator = torch.Generator().manual_seed(0)
    bn.running_mean.copy_(mean * (1 + torch.rand(C, generator=generator)))
    bn.running_var.copy_(var * (1 + torch.rand(C, generator=generator)))
    bn.weight.detach().copy_(0.5 + torch.rand(C, generator=generator))
    bn.bias.detach().copy_(torch.rand(C, generator=generator) - 0.5)
    return fbn.convert(nn.Sequential(bn).to(dtype), fbn.Freeze("merged", fold="never"))  # type: ignore[return-value]


def function(layer: Any, x: Tensor) -> Tensor:
    """Return what the layer's tensors say it computes in eval mode, in float64, from BatchNorm's formula."""
    weight, bias, mean, var = (
        getattr(layer, name).detach().double().view(1, -1, 1, 1)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    return (x.double() - mean) / (var + layer.eps).sqrt() * weight + bias


def images(net: nn.Sequential, source: nn.BatchNorm2d) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, C, 3, 3, generator=generator)
    sd, mean = source.running_var.float().sqrt(), source.running_mean.float()
    return x * sd.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)


def train(net: nn.Module, trained: tuple[str, ...], x: Tensor, lr: float) -> None:
    parameters = [getattr(net[0], name) for name in trained]  # type: ignore[index]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    for _ in range(3):
        optimizer.zero_grad()
        net(x.to(parameters[0].dtype)).float().square().mean().backward()
        optimizer.step()


# finetune_bn's own case 27: an optimizer that holds gamma' alone (groups without weight decay), or beta frozen.
@pytest.mark.parametrize("trained", [("weight",), ("bias",), ("weight", "bias")], ids="-".join)
@pytest.mark.parametrize(
    "back",
    [fbn.revert, *(lambda m, p=p: fbn.convert(m, p) for p in (fbn.Keep(), fbn.Freeze("none"), fbn.Freeze("original")))],
    ids=["revert", "keep", "none", "original"],
)
@pytest.mark.parametrize("mean", [3.0, 2000.0])
def test_a_trained_merged_layer_comes_back_with_its_function_whichever_of_the_two_moved(
    trained: tuple[str, ...], back: Callable[[nn.Module], nn.Module], mean: float
) -> None:
    net = merged(mean)
    x = images(net, net[0]._source[0])  # type: ignore[arg-type,union-attr]
    with torch.no_grad():
        for name in trained:
            getattr(net[0], name).mul_(1.001)
    expected = function(net[0], x)
    plain = back(net)
    off = (function(plain[0], x) - expected).abs().max() / expected.abs().max()  # type: ignore[index]
    assert off < 2e-6


def test_the_channels_that_did_not_move_come_back_bit_for_bit_beside_those_that_did() -> None:
    net = merged()
    source = copy.deepcopy(net[0]._source[0])
    with torch.no_grad():
        net[0].weight[1] *= 1.25
        net[0].bias[3] += 0.5
    plain = fbn.revert(net)[0]
    still = torch.tensor([0, 2, 4])
    for name in ("weight", "bias"):
        assert torch.equal(getattr(plain, name)[still], getattr(source, name)[still])
    assert torch.equal(plain.running_mean, source.running_mean)
    assert torch.equal(plain.running_var, source.running_var)
    assert plain.bias[1] != source.bias[1]  # beta' stayed, and belongs to another beta under the new gamma'


def test_random_layers_in_any_dtype_are_solved_back_and_none_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(low: float, high: float, n: int = 1) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}
    reverted = 0
    for i in range(90):
        dtype = list(tolerance)[i % 3]
        bn = nn.BatchNorm2d(C)
        sd = 10 ** draw(-2, 1, C)
        bn.running_var.copy_(sd**2)
        bn.running_mean.copy_(sd * 10 ** draw(-2, 3, C))
        bn.weight.detach().copy_(10 ** draw(-1, 1, C))
        x = (torch.randn(4, C, 3, 3, generator=generator) * sd.view(1, -1, 1, 1)).add(bn.running_mean.view(1, -1, 1, 1))
        net = nn.Sequential(bn).to(dtype)
        try:
            net = fbn.convert(net, fbn.Freeze("merged", fold="never"), example_input=x.to(dtype))  # type: ignore[assignment]
        except ConversionMismatch:  # beta' rounded to bfloat16 would lose the function: refused, and rightly so
            assert dtype == torch.bfloat16
            continue
        trained = [("weight",), ("bias",), ("weight", "bias")][i % 3 if i % 2 else 2]
        before = [getattr(net[0], name).detach().clone() for name in ("weight", "bias")]
        train(net, trained, x, lr=float(10 ** draw(-6, -3)))
        expected = function(net[0], x)
        moved = (net[0].weight != before[0]) | (net[0].bias != before[1])
        plain = fbn.revert(net, example_input=x.to(dtype))
        # A channel that did not move comes back as it was before beta' was rounded, so it has another rounding.
        off = (function(plain[0], x) - expected)[:, moved].abs().amax() if moved.any() else torch.zeros(())  # type: ignore[index]
        assert off < tolerance[dtype] * expected.abs().max(), (i, dtype)
        reverted += 1
    assert reverted > 60


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda layer: layer.weight.__setitem__(2, float("inf")), r"its weight hold values that are NaN or infinite"),
        (lambda layer: layer.bias.__setitem__(2, float("nan")), r"its bias hold values that are NaN or infinite"),
        (
            lambda layer: layer.weight.__setitem__(2, 3e38),
            r"its weight for the .* would not fit into torch.float32.*model.double\(\)",
        ),
    ],
    ids=["inf", "nan", "overflow"],
)
def test_a_layer_that_cannot_be_solved_back_is_named_and_nothing_is_written(
    spoil: Callable[[Any], None], why: str, verify: bool
) -> None:
    net = fbn.convert(settle(Plain()), fbn.Freeze("merged", fold="never"))
    with torch.no_grad():
        net.bn1.weight.mul_(1.5)  # type: ignore[union-attr, operator]
        spoil(net.bn2)
    layers = [net.bn1, net.bn2]
    before = copy.deepcopy([(m.state_dict(), m._source[0].state_dict()) for m in layers])  # type: ignore[union-attr, index]
    for back in (fbn.revert, lambda m, verify: fbn.convert(m, fbn.Freeze("none"), verify=verify)):
        with pytest.raises(UnsupportedLayer, match=rf"(?s)Nothing was changed.*bn2: {why}") as caught:
            back(net, verify=verify)  # type: ignore[operator]
        assert "bn1" not in str(caught.value)
        assert [net.bn1, net.bn2] == layers
        after = [(m.state_dict(), m._source[0].state_dict()) for m in layers]  # type: ignore[union-attr, index]
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("affine", ["none", "shift", "merged", "original"])
def test_a_revert_that_fails_in_its_proof_leaves_the_batch_norm_kept_aside_as_it_was(affine: Any) -> None:
    class Picky(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 if isinstance(self.bn1, fbn.layers.FrozenBatchNorm) else 2)

    net = fbn.convert(settle(Picky()).eval(), fbn.Freeze(affine, fold="never"))
    with torch.no_grad():
        net.bn1.weight.mul_(1.5)  # type: ignore[union-attr, operator]
        net.bn1.running_mean.add_(0.0 if affine == "merged" else 1.0)  # type: ignore[union-attr, operator]
    source = net.bn1._source[0]  # type: ignore[union-attr, index]
    source.train()
    before = copy.deepcopy(source.state_dict())
    with pytest.raises(ConversionMismatch):
        fbn.revert(net, example_input=torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(source.state_dict(), before, rtol=0, atol=0)
    assert source.training


def test_fold_of_a_trained_merged_layer_that_no_map_takes_keeps_the_function() -> None:
    net = nn.Sequential(nn.Conv2d(C, C, 1), nn.ReLU(), *merged(40.0))
    x = torch.randn(4, C, 3, 3, generator=torch.Generator().manual_seed(1)) + 40
    with torch.no_grad():
        net[2].weight *= 1.25  # beta' alone stays
    expected = net.eval()(x)
    folded = fbn.fold(net, x)
    assert isinstance(folded[2], nn.BatchNorm2d)  # type: ignore[index]
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("moved", ["weight", "bias"])
def test_recalibration_and_banks_know_the_gamma_and_beta_of_a_trained_merged_layer(moved: str) -> None:
    net = merged(20.0)
    x = images(net, net[0]._source[0])  # type: ignore[arg-type,union-attr]
    with torch.no_grad():
        getattr(net[0], moved).mul_(1.5)
    now = statistics_of(net[0])
    now_as_layer = SimpleNamespace(weight=now.weight, bias=now.bias, running_mean=now.mean, running_var=now.var)
    now_as_layer.eps = now.eps
    torch.testing.assert_close(function(now_as_layer, x), function(net[0], x), rtol=1e-5, atol=1e-5)
    expected = net(x)
    fbn.recalibrate(net, [x + 1.0] * 2, how="preserve")
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(function(fbn.revert(net)[0], x), expected.double(), rtol=1e-4, atol=1e-4)  # type: ignore[index]
