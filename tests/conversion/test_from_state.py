"""Which policy a state dict needs, told by the state dict alone."""

from __future__ import annotations

import copy

import torch
from torch import nn

import finetune_bn as fbn
from finetune_bn.conversion.from_state import policy_in_state
from tests.models import settle


def net() -> nn.Module:
    torch.manual_seed(0)
    return settle(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))


def test_layers_that_compute_something_else_are_named_and_what_is_not_ours_is_left_out() -> None:
    group, even = fbn.ToGroupNorm(groups=2), fbn.EvalNorm(0.25)
    state = fbn.convert(net(), fbn.Rules([("1", group), ("3", even)])).state_dict()
    found = policy_in_state(net(), state)
    assert found is not None
    again = fbn.convert(net(), found, verify=False)
    again.load_state_dict(state)
    x = torch.randn(2, 3, 5, 5)
    other = fbn.convert(net(), fbn.Rules([("1", group), ("3", even)]))
    torch.testing.assert_close(again.eval()(x), other.eval()(x))
    assert policy_in_state(again, state) is None  # it has them already
    assert policy_in_state(net(), net().state_dict()) is None
    assert policy_in_state(net(), fbn.convert(net(), fbn.Freeze()).state_dict()) is None
    foreign = copy.copy(net().state_dict())
    foreign["1._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    assert policy_in_state(net(), foreign) is None
