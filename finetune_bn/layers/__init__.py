"""Layers that stand in for BatchNorm."""

from finetune_bn.layers.frozen import FrozenBatchNorm, FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
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
from finetune_bn.layers.tracking import TrackingBatchNorm

__all__ = [
    # statistics fixed
    "FrozenBatchNorm",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "FrozenBatchNormAct2d",
    "NoisyFrozenBatchNorm",
    "NoisyFrozenBatchNorm1d",
    "NoisyFrozenBatchNorm2d",
    "NoisyFrozenBatchNorm3d",
    "NoisyFrozenBatchNormAct2d",
    # statistics of each image
    "GroupNorm",
    "GroupNormAct2d",
    # statistics live
    "TrackingBatchNorm",
    "GhostBatchNorm",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GhostBatchNormAct2d",
    "BatchRenorm",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "BatchRenormAct2d",
    "StochasticBatchNorm",
    "StochasticBatchNorm1d",
    "StochasticBatchNorm2d",
    "StochasticBatchNorm3d",
    "StochasticBatchNormAct2d",
    "EvalBatchNorm",
    "EvalBatchNorm1d",
    "EvalBatchNorm2d",
    "EvalBatchNorm3d",
    "EvalBatchNormAct2d",
]
