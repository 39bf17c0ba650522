"""The policy of each layer is read from the layers, whoever converted them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune_bn import (
    EvalNorm,
    Freeze,
    FreezeAffine,
    Ghost,
    Keep,
    NormalizeOnly,
    Policy,
    Renorm,
    Rules,
    Stochastic,
    ToGroupNorm,
    convert,
)
from finetune_bn.conversion.current import current_plan, policy_of
from tests.models import Plain, Tied, build, settle

POLICIES = [
    *(Freeze(affine) for affine in ("none", "shift", "merged", "original")),  # type: ignore[arg-type]
    Freeze("original", noise=8),
    Freeze("original", fold="never"),
    FreezeAffine(),
    NormalizeOnly(change_function=True),
    Ghost(groups=2),
    Renorm(r_max=3.0, d_max=5.0),
    Stochastic(0.5),
    EvalNorm(0.75),
    ToGroupNorm(groups=2, init="copy"),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.describe())
def test_the_policy_of_a_converted_layer_is_that_by_which_it_was_converted(policy: Policy) -> None:
    model, x = build("plain")
    convert(model, policy, example_input=x)
    assert policy_of(model.bn1) == policy_of(model.bn2) == policy


def test_a_batch_norm_as_it_came_has_no_policy_and_a_reverted_one_neither() -> None:
    model, x = build("plain")
    assert policy_of(model.bn1) is None
    convert(convert(model, Ghost(2), example_input=x), Keep(), example_input=x)
    assert policy_of(model.bn1) is None


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.describe())
def test_the_current_plan_brings_a_fresh_model_where_this_one_is(policy: Policy) -> None:
    model, x = build("plain")
    convert(model, Rules([("bn2", policy), ("*", Keep())]), example_input=x)
    twin = convert(settle(Plain(), seed=3), current_plan(model), verify=False)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(twin.eval()(x), model.eval()(x))
    assert [row.policy for row in current_plan(twin).rows] == [None, policy]


def test_a_shared_layer_is_one_row_with_both_names() -> None:
    plan = current_plan(convert(settle(Tied()), Freeze(), example_input=torch.randn(2, 4, 6, 6)))
    assert [row.names for row in plan.rows] == [("first.bn", "second.bn"), ("between",)]
    assert isinstance(plan.rows[0].policy, Freeze)
    assert current_plan(nn.Linear(1, 1)).rows == ()
