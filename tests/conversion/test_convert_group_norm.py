"""ToGroupNorm in plan, convert and revert: all or nothing, named, and the layers beside it still proven."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.conversion.plan import Plan
from finetune_bn.conversion.policies import policy_from_dict
from finetune_bn.errors import ConversionMismatch, FinetuneBNError, NoBatchNormMatched, UnsupportedLayer
from finetune_bn.layers import FrozenBatchNorm, GroupNorm, GroupNormAct2d
from finetune_bn.layers.sites import find_batch_norms
from tests.models import NETS, AsksForItsType, build, settle, with_norm


def group_norms(model: nn.Module) -> list[GroupNorm]:
    return [module for module in model.modules() if isinstance(module, GroupNorm)]


@pytest.mark.parametrize("net", NETS)
def test_every_kind_is_converted_and_reverted_bit_for_bit(net: str) -> None:
    model, x = build(net)
    model.eval()
    before, y = {name: value.clone() for name, value in model.state_dict().items()}, model(x)
    count = len(find_batch_norms(model))
    model = fbn.convert(model, fbn.ToGroupNorm(), example_input=x)
    assert len(group_norms(model)) == count
    assert not find_batch_norms(model)
    assert len(find_batch_norms(model, group_norms=True)) == count
    assert not torch.allclose(model(x), y)
    model = fbn.revert(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("policy", [fbn.Keep(), fbn.Freeze(), fbn.Ghost(2)], ids=lambda policy: type(policy).__name__)
def test_another_policy_afterwards_starts_from_the_batch_norm(policy: fbn.Policy) -> None:
    model, x = build("plain")
    y = model.eval()(x)
    fbn.convert(fbn.convert(model, fbn.ToGroupNorm(groups=2)), policy)
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize(
    "first", [fbn.Freeze("merged"), fbn.Ghost(2), fbn.FreezeAffine()], ids=lambda p: type(p).__name__
)
def test_group_norm_after_another_policy_is_as_from_the_batch_norm(first: fbn.Policy) -> None:
    direct, x = build("plain")
    around, _ = build("plain")
    fbn.convert(direct, fbn.ToGroupNorm(groups=2))
    fbn.convert(fbn.convert(around, first), fbn.ToGroupNorm(groups=2))
    torch.testing.assert_close(around(x), direct(x))
    assert all(p.requires_grad for p in around.parameters())


def test_the_same_plan_twice_changes_nothing_and_another_starts_anew(caplog: pytest.LogCaptureFixture) -> None:
    model, x = build("plain")
    fbn.convert(model, fbn.ToGroupNorm(groups=2), example_input=x)
    first = group_norms(model)
    with caplog.at_level(logging.INFO):
        fbn.convert(model, fbn.ToGroupNorm(groups=2), example_input=x)
    assert "changes what the network computes" not in caplog.text
    assert all(a is b for a, b in zip(first, group_norms(model), strict=True))
    fbn.convert(model, fbn.ToGroupNorm(groups=1))
    assert [layer.num_groups for layer in group_norms(model)] == [1] * len(first)


def test_a_layer_shared_by_two_parents_stays_shared() -> None:
    model, x = build("tied")
    fbn.convert(model, fbn.ToGroupNorm(), example_input=x)
    assert model.first.bn is model.second.bn
    assert isinstance(model.first.bn, GroupNorm)


def test_rules_mix_policies_and_the_other_layers_are_still_proven() -> None:
    model, x = build("plain")
    names = [site.names[0] for site in find_batch_norms(model)]
    fbn.convert(model, fbn.Rules([(names[0], fbn.ToGroupNorm()), ("*", fbn.Freeze())]), example_input=x)
    kinds = [site.kind for site in find_batch_norms(model, group_norms=True)]
    assert kinds == ["GroupNorm", *["FrozenBatchNorm2d"] * (len(names) - 1)]

    liar = settle(AsksForItsType())  # computes something else once bn2 is no BatchNorm2d
    with pytest.raises(ConversionMismatch):
        fbn.convert(
            liar, fbn.Rules([("bn1", fbn.ToGroupNorm()), ("*", fbn.Freeze())]), example_input=torch.randn(2, 3, 5, 5)
        )
    assert all(type(site.module) is nn.BatchNorm2d for site in find_batch_norms(liar))


class TakesNoGroupNorm(nn.Module):
    """Its forward reads running_mean of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.other = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.bn(x)) + self.bn.running_mean.sum()


def test_a_network_that_does_not_run_with_group_norm_is_left_as_it_was() -> None:
    model = settle(TakesNoGroupNorm())
    with pytest.raises(ConversionMismatch, match="running_mean"):
        fbn.convert(
            model,
            fbn.Rules([("bn", fbn.ToGroupNorm()), ("*", fbn.Freeze())]),
            example_input=torch.randn(2, 3, 4, 4),
        )
    assert [type(site.module) for site in find_batch_norms(model)] == [nn.BatchNorm2d] * 2


def test_how_far_the_layers_are_off_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    errors = []
    for init in ("closed_form", "copy"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "finetune_bn"):
            fbn.convert(build("plain")[0], fbn.ToGroupNorm(init=init))  # type: ignore[arg-type]
        text = next(message for message in caplog.messages if "changes what the network computes" in message)
        errors.append(float(text.partition("off by ")[2].partition(" of")[0]))
    assert errors[0] < 0.3 < errors[1]


def test_one_channel_a_group_on_a_map_of_one_position_is_frozen_instead() -> None:
    """opacus replaces such a layer, and its features become zero."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 7, 7)
    policy = fbn.ToGroupNorm(channels_per_group=1)
    rows = fbn.plan(settle(model), policy, x).rows
    assert [type(row.policy).__name__ for row in rows] == ["ToGroupNorm", "Freeze"]
    assert "one position" in rows[1].reason
    fbn.convert(model, policy, example_input=x)
    assert isinstance(model[1], GroupNorm)
    assert isinstance(model[4], FrozenBatchNorm)
    assert model(x).std(0).min() > 0

    wide = settle(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)))
    assert isinstance(fbn.convert(wide, fbn.ToGroupNorm(groups=1), example_input=x)[1], GroupNorm)  # type: ignore[index]


@pytest.mark.parametrize("give_input", [True, False])
def test_a_batch_norm_behind_a_linear_layer_is_frozen_where_each_channel_is_a_group(give_input: bool) -> None:
    model, x = build("head1d")
    row = fbn.plan(model, fbn.ToGroupNorm(groups=8), x if give_input else None).rows[0]
    assert isinstance(row.policy, fbn.Freeze)
    assert ("no example input" in row.reason) is not give_input


def test_a_sequence_is_normalized_with_one_channel_a_group_where_the_input_shows_that_it_is_one() -> None:
    model, x = build("sequence1d")
    assert isinstance(fbn.plan(model, fbn.ToGroupNorm(channels_per_group=1), x).rows[0].policy, fbn.ToGroupNorm)


def test_the_plan_says_what_does_not_divide_and_what_is_still_to_be_fitted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 24, 1), settle(nn.BatchNorm2d(24)))
    assert "8 groups: 24 channels are no multiple of 32" in fbn.plan(model, fbn.ToGroupNorm(groups=32)).rows[0].reason
    assert "calibrate_group_norm" in fbn.plan(model, fbn.ToGroupNorm(init="sequential")).rows[0].reason
    fresh = nn.Sequential(nn.Conv2d(3, 24, 1), nn.BatchNorm2d(24))
    assert "those of a new layer" in fbn.plan(fresh, fbn.ToGroupNorm()).rows[0].reason
    assert not fbn.plan(model, fbn.ToGroupNorm(groups=4)).rows[0].reason


def test_what_it_cannot_start_from_is_refused_by_name_and_nothing_changes() -> None:
    model = with_norm(nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(UnsupportedLayer, match="'reset' and 'copy' do without"):
        fbn.convert(model, fbn.ToGroupNorm())
    assert type(model[1]) is nn.BatchNorm2d  # type: ignore[index]
    assert isinstance(fbn.convert(model, fbn.ToGroupNorm(init="reset"))[1], GroupNorm)  # type: ignore[index]
    with pytest.raises(NoBatchNormMatched):
        fbn.convert(nn.Sequential(nn.GroupNorm(1, 4), GroupNorm(1, 4)), fbn.ToGroupNorm())


@pytest.mark.parametrize(
    "policy",
    [fbn.ToGroupNorm(), fbn.ToGroupNorm(4, init="copy"), fbn.ToGroupNorm(channels_per_group=2, init="sequential")],
)
def test_policy_and_plan_survive_the_way_through_plain_data(policy: fbn.ToGroupNorm) -> None:
    assert policy_from_dict(policy.to_dict()) == policy
    the_plan = fbn.plan(build("plain")[0], policy)
    assert Plan.from_dict(the_plan.to_dict()) == the_plan
    model, x = build("plain")
    direct = fbn.convert(build("plain")[0], policy)
    torch.testing.assert_close(fbn.convert(model, Plan.from_dict(the_plan.to_dict()))(x), direct(x))


@pytest.mark.parametrize("arguments", [{"groups": -1}, {"groups": 2, "channels_per_group": 2}, {"init": "zeros"}])
def test_a_wrong_policy_is_one_clear_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(FinetuneBNError, match="got"):
        fbn.ToGroupNorm(**arguments)


def test_a_timm_network_of_norm_and_activation_is_converted_whole() -> None:
    import timm

    model = settle(timm.create_model("tf_efficientnet_lite0", num_classes=3)).eval()
    count = len(find_batch_norms(model))
    fbn.convert(model, fbn.ToGroupNorm(groups=4))
    assert len(group_norms(model)) == count == 49
    acting = [layer for layer in group_norms(model) if isinstance(layer, GroupNormAct2d)]
    assert {type(layer.act).__name__ for layer in acting} >= {"ReLU6"}


def test_recalibration_leaves_group_norm_alone() -> None:
    model, x = build("plain")
    names = [site.names[0] for site in find_batch_norms(model)]
    fbn.convert(model, fbn.Rules([(names[0], fbn.ToGroupNorm())]))
    record = fbn.recalibrate(model, [torch.randn(16, *x.shape[1:])])
    assert [row.names[0] for row in record.rows] == names[1:]
