"""Layers of a state dict that compute something else than BatchNorm, told by the state dict itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from finetune_bn.conversion.policies import EvalNorm, Policy, Rule, Rules, ToGroupNorm
from finetune_bn.layers.extra_state import EXTRA_STATE, unpack
from finetune_bn.layers.group_norm import GroupNorm
from finetune_bn.layers.stochastic import EvalBatchNorm


def policy_in_state(model: nn.Module, state_dict: Mapping[str, Any]) -> Rules | None:
    """Return the policy that a model needs before it can take a state dict, where no plan is there that says more.

    Layers converted to GroupNorm and EvalNorm layers carry in the state dict what they compute by. All others compute
    what a BatchNorm does in eval mode; whether they were frozen no state dict tells.

    Args:
        model: the model, its layers BatchNorm or converted already.
        state_dict: that of a converted one.

    Returns:
        A rule for each such layer that the model has not got yet; None where there is none.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    rules = []
    for key, value in state_dict.items():
        name, _, last = key.rpartition(".")
        if last != EXTRA_STATE or name not in modules or isinstance(modules[name], (GroupNorm, EvalBatchNorm)):
            continue
        try:
            facts, _ = unpack(value)
        except ValueError:  # some other package's
            continue
        policy: Policy
        if "num_groups" in facts:
            policy = ToGroupNorm(groups=facts["num_groups"], init="reset", eps=facts["eps"])
        else:
            policy = EvalNorm(facts["alpha"])
        rules.append(Rule(policy, name=name))
    return Rules(rules) if rules else None
