"""Reading, using and writing the statistics of each kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import finetune_bn as fbn
from finetune_bn.layers.statistics import (
    normalize,
    normalize_by_batch,
    statistics_of,
    store,
    why_no_statistics,
)
from tests.models import settle
from tests.references import values_of

KINDS = [None, "none", "shift", "merged", "original"]


def layer(affine: Any) -> nn.Module:
    bn = settle(nn.BatchNorm2d(4)).eval()
    return bn if affine is None else fbn.convert(bn, fbn.Freeze(affine))


def x(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 4, 3, 3, generator=torch.Generator().manual_seed(1)) * 2 + 1


@pytest.mark.parametrize("affine", KINDS)
def test_statistics_are_those_of_the_batch_norm_that_a_layer_stands_for(affine: Any) -> None:
    expected, found = values_of(layer(None)), statistics_of(layer(affine))
    for name in ("mean", "var", "weight", "bias"):
        torch.testing.assert_close(getattr(found, name).double().numpy(), getattr(expected, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("affine", KINDS)
@pytest.mark.parametrize("preserve", [False, True])
def test_what_is_stored_is_what_normalize_computed(affine: Any, preserve: bool) -> None:
    module = layer(affine)
    before = module(x())
    now = statistics_of(module).moved_to(torch.full((4,), 0.7), torch.full((4,), 2.5), preserve=preserve)
    expected = normalize(module, x(), now)
    store(module, now, preserve=preserve)
    torch.testing.assert_close(module(x()), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(module(x()), before, atol=1e-5) == preserve
    again = statistics_of(module)
    torch.testing.assert_close(again.mean, now.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again.var, now.var, rtol=1e-6, atol=1e-6)


def test_a_merged_layer_stays_canonical_and_preserve_does_not_move_a_bit() -> None:
    module = layer("merged")
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    store(module, statistics_of(module).moved_to(torch.ones(4), torch.ones(4), preserve=True), preserve=True)
    assert torch.equal(module.weight, weight)
    assert torch.equal(module.bias, bias)
    assert torch.equal(module.running_mean, torch.zeros(4))
    store(module, statistics_of(module).moved_to(torch.ones(4), torch.full((4,), 4.0), preserve=False), preserve=False)
    assert not torch.equal(module.weight, weight)
    assert torch.equal(module.running_mean, torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_training_kernel_measures_what_it_normalizes_by(dtype: torch.dtype) -> None:
    module = layer(None)
    mean, var = torch.zeros(2, 4)
    y = normalize_by_batch(module, x().to(dtype), statistics_of(module), mean, var)
    values = x().to(dtype).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), values.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), values.var(1), rtol=1e-5, atol=1e-5)
    expected = statistics_of(module).moved_to(mean, values.var(1, correction=0), preserve=False)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(y, normalize(module, x().to(dtype), expected), rtol=tolerance, atol=tolerance)


def test_a_norm_act_layer_applies_its_activation_live_and_frozen() -> None:
    timm = pytest.importorskip("timm")
    bn = settle(timm.layers.BatchNormAct2d(4)).eval()
    expected = bn(x())
    for module in (bn, fbn.convert(bn, fbn.Freeze("none"))):
        torch.testing.assert_close(normalize(module, x(), statistics_of(module)), expected, rtol=1e-5, atol=1e-5)
    assert expected.min() == 0


@pytest.mark.parametrize(
    ("module", "preserve", "reason"),
    [
        (nn.BatchNorm2d(4, track_running_stats=False), False, "has no running statistics"),
        (nn.BatchNorm2d(4, affine=False), True, "no gamma and beta"),
        (fbn.convert(nn.BatchNorm2d(4), fbn.Freeze("merged")), False, "are gone"),
    ],
)
def test_what_cannot_be_measured_is_named(module: nn.Module, preserve: bool, reason: str) -> None:
    if isinstance(module, nn.BatchNorm2d):
        assert reason in str(why_no_statistics(module, preserve=preserve))
        return
    module._source = ()
    assert reason in str(why_no_statistics(module, preserve=preserve))
    assert why_no_statistics(module, preserve=True) is None


def test_a_subclass_with_a_forward_of_its_own_is_left_alone() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input

    assert "something of its own" in str(why_no_statistics(Own(4), preserve=False))
    assert why_no_statistics(nn.BatchNorm2d(4), preserve=True) is None
