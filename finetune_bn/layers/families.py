"""Which class of a family stands for a BatchNorm layer: by its number of dimensions, and by what is behind it."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.layers.frozen import (
    FrozenBatchNorm,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
)
from finetune_bn.layers.ghost import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from finetune_bn.layers.group_norm import GroupNorm
from finetune_bn.layers.noise import (
    NoisyFrozenBatchNorm,
    NoisyFrozenBatchNorm1d,
    NoisyFrozenBatchNorm2d,
    NoisyFrozenBatchNorm3d,
)
from finetune_bn.layers.norm_act import (
    BatchRenormAct2d,
    EvalBatchNormAct2d,
    FrozenBatchNormAct2d,
    GhostBatchNormAct2d,
    GroupNormAct2d,
    NoisyFrozenBatchNormAct2d,
    StochasticBatchNormAct2d,
    is_norm_act,
)
from finetune_bn.layers.renorm import BatchRenorm, BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from finetune_bn.layers.stochastic import (
    EvalBatchNorm,
    EvalBatchNorm1d,
    EvalBatchNorm2d,
    EvalBatchNorm3d,
    StochasticBatchNorm,
    StochasticBatchNorm1d,
    StochasticBatchNorm2d,
    StochasticBatchNorm3d,
)

Kind = TypeVar("Kind", bound=nn.Module)
# Of one kind the classes for any input, for 1d, 2d and 3d, and for a 2d layer with an activation behind it.
Family = tuple[type[Kind], type[Kind], type[Kind], type[Kind], type[Kind]]


FROZEN: Family[FrozenBatchNorm] = (
    FrozenBatchNorm,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    FrozenBatchNormAct2d,
)
NOISY: Family[NoisyFrozenBatchNorm] = (
    NoisyFrozenBatchNorm,
    NoisyFrozenBatchNorm1d,
    NoisyFrozenBatchNorm2d,
    NoisyFrozenBatchNorm3d,
    NoisyFrozenBatchNormAct2d,
)
GHOST: Family[GhostBatchNorm] = (
    GhostBatchNorm,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    GhostBatchNormAct2d,
)
RENORM: Family[BatchRenorm] = (BatchRenorm, BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, BatchRenormAct2d)
STOCHASTIC: Family[StochasticBatchNorm] = (
    StochasticBatchNorm,
    StochasticBatchNorm1d,
    StochasticBatchNorm2d,
    StochasticBatchNorm3d,
    StochasticBatchNormAct2d,
)
EVAL: Family[EvalBatchNorm] = (
    EvalBatchNorm,
    EvalBatchNorm1d,
    EvalBatchNorm2d,
    EvalBatchNorm3d,
    EvalBatchNormAct2d,
)
# GroupNorm takes inputs of any rank.
GROUP: Family[GroupNorm] = (GroupNorm, GroupNorm, GroupNorm, GroupNorm, GroupNormAct2d)


def frozen_class(bn: _BatchNorm) -> type[FrozenBatchNorm]:
    """Return the frozen class for a BatchNorm layer."""
    return class_for(bn, FROZEN)


def class_for(bn: _BatchNorm, family: Family[Kind]) -> type[Kind]:
    """Return which class of a family stands for a BatchNorm layer."""
    if is_norm_act(bn):
        return family[4]
    for live, kind in zip((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), family[1:], strict=False):
        if isinstance(bn, live):
            return kind
    return family[0]  # SyncBatchNorm and the `_BatchNormXd` that reverting it leaves take any input rank
