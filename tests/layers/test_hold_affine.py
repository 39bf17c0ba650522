"""Live BatchNorm with its gamma and beta held constant, and let go again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from finetune_bn.layers import FrozenBatchNorm2d
from finetune_bn.layers.hold_affine import changes_function, hold_affine, is_held, release_affine, train_again
from tests.models import settle
from tests.tools import assert_same_state


def batch_norm(**arguments: bool) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(4, **arguments)
    settle(bn)
    return bn


@pytest.mark.parametrize("reset", [True, False])
def test_a_held_layer_is_the_same_batch_norm_with_live_statistics(reset: bool) -> None:
    bn = batch_norm()
    weight = bn.weight
    hold_affine(bn, reset=reset)
    before = bn.running_mean.clone()
    bn(torch.randn(8, 4, 3, 3) + 5)
    assert type(bn) is nn.BatchNorm2d
    assert bn.weight is weight
    assert not torch.equal(bn.running_mean, before)
    assert is_held(bn)


def test_holding_keeps_the_values_and_trains_nothing() -> None:
    bn = batch_norm()
    hold_affine(bn, reset=False)
    assert_same_state(bn.state_dict(), batch_norm().state_dict())
    assert not any(p.requires_grad for p in bn.parameters())


def test_holding_with_reset_normalizes_only() -> None:
    bn, x = batch_norm(), torch.randn(8, 4, 3, 3)
    hold_affine(bn, reset=True)
    y = bn(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_releasing_restores_values_and_requires_grad(reset: bool, trained: bool) -> None:
    bn = batch_norm()
    bn.weight.requires_grad_(trained)
    hold_affine(bn, reset=reset)
    hold_affine(bn, reset=reset)  # held twice is held once
    release_affine(bn)
    assert not is_held(bn)
    assert (bn.weight.requires_grad, bn.bias.requires_grad) == (trained, True)
    assert_same_state(bn.state_dict(), batch_norm().state_dict())
    release_affine(bn)  # released twice is released once
    assert_same_state(bn.state_dict(), batch_norm().state_dict())


def test_releasing_keeps_values_that_are_no_longer_the_constants() -> None:
    bn = batch_norm()
    hold_affine(bn, reset=True)
    with torch.no_grad():
        bn.weight[0] = 3.0
    release_affine(bn)
    assert bn.weight.tolist() == [3.0, 1.0, 1.0, 1.0]
    assert torch.equal(bn.bias, batch_norm().bias)


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_a_missing_weight_or_bias_stays_missing(missing: str) -> None:
    bn = batch_norm()
    bn.register_parameter(missing, None)
    before = copy.deepcopy(bn.state_dict())
    hold_affine(bn, reset=True)
    assert getattr(bn, missing) is None
    release_affine(bn)
    assert_same_state(bn.state_dict(), before)


def test_a_copy_of_a_held_layer_is_released_by_itself() -> None:
    bn = batch_norm()
    hold_affine(bn, reset=True)
    other = copy.deepcopy(bn)
    release_affine(other)
    assert_same_state(other.state_dict(), batch_norm().state_dict())
    assert is_held(bn)
    assert bn.weight.tolist() == [1.0] * 4


def test_what_stands_in_for_a_held_layer_is_trained_as_the_layer_was_before() -> None:
    bn = batch_norm()
    bn.bias.requires_grad_(False)
    hold_affine(bn, reset=False)
    frozen = FrozenBatchNorm2d.from_batch_norm(bn, "merged")
    assert not any(p.requires_grad for p in frozen.parameters())
    train_again(bn, frozen)
    assert (frozen.weight.requires_grad, frozen.bias.requires_grad) == (True, False)
    train_again(bn, nn.Identity())  # constants need nothing


@pytest.mark.parametrize(
    ("weight", "bias", "changes"),
    [
        (torch.ones(3), torch.zeros(3), False),
        (None, torch.zeros(3), False),
        (torch.ones(3), None, False),
        (torch.tensor([1.0, 1.0, 0.9]), torch.zeros(3), True),
        (torch.ones(3), torch.tensor([0.0, 1e-3, 0.0]), True),
        (torch.ones(3, device="meta"), torch.zeros(3, device="meta"), False),
    ],
)
def test_resetting_changes_the_function_unless_gamma_is_1_and_beta_0(
    weight: torch.Tensor | None, bias: torch.Tensor | None, changes: bool
) -> None:
    assert changes_function(weight, bias) is changes
