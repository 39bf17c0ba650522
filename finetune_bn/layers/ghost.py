"""Ghost batches: each of K strided groups of a batch is normalized by its own statistics."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.functional.batch import Normalized, ghost_batch_norm
from finetune_bn.layers.tracking import TrackingBatchNorm


class GhostBatchNorm(TrackingBatchNorm):
    """BatchNorm whose batch statistics are those of `x[i::groups]`, for inputs of shape [N, C, ...].

    In a batch of P labels with K images each, label by label, the groups with `groups=K` hold one image of each
    label: images of one label never share statistics, and within a group the images are as good as i.i.d. The running
    statistics follow those of the whole batch, the variance between the groups' means included. Evaluation is
    BatchNorm's. Hoffer et al. 2017, "Train longer, generalize better", section 3 (groups in a row there).

    Where the batch is no multiple of `groups`, the first groups have one image more; a batch with fewer images than
    groups has a group for each image. Groups of a single value a channel: see `TrackingBatchNorm`.

    Args:
        num_features: number of channels C.
        groups: number of groups in a batch.
        eps: added to the variances.
        momentum: share of the new batch in the running statistics; None: their average over all batches.
        affine: whether there are `weight` and `bias`.
        device: where the tensors are made.
        dtype: dtype of the tensors.

    Raises:
        FinetuneBNError: `groups` is no whole number from 1 on.
    """

    def __init__(
        self,
        num_features: int,
        groups: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device, dtype)
        check_groups(groups, 1)
        self.groups = groups

    @classmethod
    def from_batch_norm(cls, bn: _BatchNorm, groups: int) -> Self:
        """Return the layer that stands for `bn`, with its very Parameters; ask `why_not_tracking` first."""
        check_groups(groups, 1)
        layer = cls._standing_for(bn)
        layer.groups = groups
        return layer

    @property
    def settings(self) -> dict[str, Any]:
        """What `from_batch_norm` takes besides the BatchNorm."""
        return {"groups": self.groups}

    def _smallest_group(self, x: Tensor) -> int:
        return min(x.shape[0], max(x.shape[0] // self.groups, 1))

    def _normalize(self, x: Tensor) -> Normalized:
        return ghost_batch_norm(x, self.groups, self.weight, self.bias, self.eps)


class GhostBatchNorm1d(GhostBatchNorm):
    """`GhostBatchNorm` for [N, C] or [N, C, L]."""

    _takes, _plain = (2, 3), nn.BatchNorm1d


class GhostBatchNorm2d(GhostBatchNorm):
    """`GhostBatchNorm` for [N, C, H, W]."""

    _takes, _plain = (4,), nn.BatchNorm2d


class GhostBatchNorm3d(GhostBatchNorm):
    """`GhostBatchNorm` for [N, C, D, H, W]."""

    _takes, _plain = (5,), nn.BatchNorm3d


def check_groups(groups: object, least: int) -> None:
    """Raise unless `groups` is a whole number from `least` on."""
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < least:
        raise FinetuneBNError(
            complaint("groups", groups, f"a whole number from {least} on", "Take K, the images of a label.")
        )
