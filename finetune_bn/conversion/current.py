"""Under which policy each BatchNorm layer of a model is now, read from the layers themselves."""

from __future__ import annotations

from torch import nn

from finetune_bn.conversion.plan import Plan, PlanRow
from finetune_bn.conversion.policies import (
    EvalNorm,
    Freeze,
    FreezeAffine,
    Ghost,
    NormalizeOnly,
    Policy,
    Renorm,
    Stochastic,
    ToGroupNorm,
)
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.ghost import GhostBatchNorm
from finetune_bn.layers.group_norm import GroupNorm
from finetune_bn.layers.hold_affine import is_held, was_reset
from finetune_bn.layers.noise import NoisyFrozenBatchNorm
from finetune_bn.layers.renorm import BatchRenorm
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.layers.stochastic import EvalBatchNorm, StochasticBatchNorm

_BY_SETTINGS: tuple[tuple[type[nn.Module], type[Policy]], ...] = (
    (GroupNorm, ToGroupNorm),
    (GhostBatchNorm, Ghost),
    (BatchRenorm, Renorm),
    (StochasticBatchNorm, Stochastic),
    (EvalBatchNorm, EvalNorm),
)


def policy_of(layer: nn.Module) -> Policy | None:
    """Return the policy that makes such a layer of a BatchNorm; None for a BatchNorm as it came.

    Args:
        layer: a layer that `find_batch_norms` finds.
    """
    if isinstance(layer, FrozenBatchNorm):
        noise = layer.noise if isinstance(layer, NoisyFrozenBatchNorm) else None
        return Freeze(layer.affine_kind, noise, layer.fold)
    if is_held(layer):
        return NormalizeOnly(change_function=True) if was_reset(layer) else FreezeAffine()
    for kind, policy in _BY_SETTINGS:
        if isinstance(layer, kind):
            return policy(**layer.settings)  # type: ignore[arg-type]
    return None


def current_plan(model: nn.Module) -> Plan:
    """Return the plan that brings a model of the same architecture where this one is; `convert` carries it out.

    Layers that are BatchNorm as it came have no policy in it, and are left alone.
    """
    rows = (
        PlanRow(site.names, site.kind, site.num_features, policy_of(site.module), "as it is")
        for site in find_batch_norms(model, group_norms=True)
    )
    return Plan(type(model).__name__, tuple(rows))
