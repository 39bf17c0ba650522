"""Launches of a training step are counted exactly: they depend on no machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import finetune_bn as fbn
from tests.models import settle

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from bench_launches import Step
from launches import launches_of


def net() -> nn.Module:
    return settle(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(True)),
            *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(8, 10),
        )
    ).train()


def counts(model: nn.Module, bf16: bool = False) -> tuple[int, int]:
    found = Step(model, torch.randn(4, 3, 12, 12), bf16).counts()
    return found["forward"], found["backward"]


def eval_mode(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def test_views_and_empties_launch_nothing_and_each_kernel_one() -> None:
    x = torch.randn(2, 3)
    assert launches_of(lambda: x.view(6).unsqueeze(0).detach())[0] == 0
    assert launches_of(lambda: torch.empty(3))[0] == 0
    assert launches_of(lambda: x.mul(2).add_(1))[0] == 2


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_frozen_layer_launches_one_operator_each_way_as_eval_mode_does(bf16: bool) -> None:
    expected = counts(eval_mode(net()), bf16)
    for affine in ("none", "merged", "original"):
        model = fbn.convert(net(), fbn.Freeze(affine, fold="never"), verify=False)  # type: ignore[arg-type]
        assert counts(model, bf16) == expected, affine
    of_beta = counts(fbn.convert(net(), fbn.Freeze("shift"), verify=False), bf16)
    assert of_beta == (expected[0], expected[1] + 2)  # the two sums of the gradient
    live = counts(net(), bf16)
    assert live == (expected[0] + 2, expected[1])  # the two counters of batches


def test_sharing_backward_launches_three_more_a_layer_and_two_where_the_mean_is_zero() -> None:
    apart = counts(eval_mode(net()))
    for affine, more in (("original", 3), ("merged", 2)):
        model = fbn.convert(net(), fbn.Freeze(affine, fold="always"), verify=False)  # type: ignore[arg-type]
        # Scaling the weight, summing the gradient, and the part of the mean; forward is the same.
        assert counts(model) == (apart[0], apart[1] + 2 * more), affine


def test_what_a_layer_is_converted_from_and_how_often_it_ran_makes_no_difference() -> None:
    model = fbn.convert(net(), fbn.Freeze("none"), verify=False)
    first = counts(model)
    model.eval()(torch.randn(2, 3, 12, 12))
    assert counts(model.train()) == first
    model.load_state_dict(net().state_dict())
    assert counts(model) == first  # what is known of the constants was renewed in the step before the counted one
