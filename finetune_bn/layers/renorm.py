"""Batch renormalization: trained with the statistics that it is evaluated with, and with BatchNorm's gradient."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.functional.batch import Normalized, batch_renorm
from finetune_bn.functional.frozen import at_least_float32
from finetune_bn.layers.tracking import KeepsAside, TrackingBatchNorm


class BatchRenorm(KeepsAside, TrackingBatchNorm):
    """Batch renormalization (Ioffe 2017) from pretrained statistics, for inputs of shape [N, C, ...].

    In training x is normalized by the running statistics, which are drawn towards the batch's where those are out of
    reach: further than `d_max` running standard deviations, or larger or smaller by more than the factor `r_max`.
    The gradient for x is BatchNorm's at any limits. `r_max = d_max = inf` is a frozen forward pass with that
    gradient; `r_max = 1, d_max = 0` is BatchNorm. Evaluation is BatchNorm's.

    The limits may grow: for `bn_steps` training batches they are 1 and 0, over the next `ramp_steps` they rise to
    `r_max` and `d_max`, linearly (an infinite one as 1 / (1 - t), t / (1 - t)). The paper: 5,000 steps, then 35,000
    for r and 20,000 for d. Steps are counted in `num_batches_tracked`, from the value that it had when the layer was
    made or a BatchNorm's state dict was loaded; where that was is kept in the metadata of the state dict.

    A layer whose statistics are those of a new one (mean 0, variance 1, no batch seen) takes its first batch's.

    Args:
        num_features: number of channels C.
        r_max: 1 or more; inf: no limit.
        d_max: 0 or more; inf: no limit.
        bn_steps: training batches with BatchNorm's limits before they grow.
        ramp_steps: training batches over which the limits grow.
        eps: added to the variances.
        momentum: share of the new batch in the running statistics (the paper: 0.01); None: their average over all
            batches; 0: they stay what they are.
        affine: whether there are `weight` and `bias`.
        device: where the tensors are made.
        dtype: dtype of the tensors.

    Raises:
        FinetuneBNError: a limit or a number of steps is out of its range.
    """

    def __init__(
        self,
        num_features: int,
        r_max: float = 3.0,
        d_max: float = 5.0,
        bn_steps: int = 0,
        ramp_steps: int = 0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device, dtype)
        self._schedule(r_max, d_max, bn_steps, ramp_steps)

    @classmethod
    def from_batch_norm(
        cls,
        bn: _BatchNorm,
        r_max: float = 3.0,
        d_max: float = 5.0,
        bn_steps: int = 0,
        ramp_steps: int = 0,
        momentum: float | None = None,
    ) -> Self:
        """Return the layer that stands for `bn`, with its very Parameters; ask `why_not_tracking` first.

        Args:
            bn: stays as it is.
            r_max: see the class.
            d_max: see the class.
            bn_steps: see the class.
            ramp_steps: see the class.
            momentum: None: that of `bn`.
        """
        check_momentum(momentum)
        layer = cls._standing_for(bn)
        layer._schedule(r_max, d_max, bn_steps, ramp_steps)
        layer._momentum_given = momentum
        if momentum is not None:
            layer.momentum = momentum
        return layer

    def _schedule(self, r_max: float, d_max: float, bn_steps: int, ramp_steps: int) -> None:
        check_limits(r_max, d_max, bn_steps, ramp_steps)
        self.r_max, self.d_max = float(r_max), float(d_max)
        self.bn_steps, self.ramp_steps = bn_steps, ramp_steps
        self._momentum_given: float | None = None
        self.start = self._seen()

    @property
    def settings(self) -> dict[str, Any]:
        """What `from_batch_norm` takes besides the BatchNorm."""
        limits = {"r_max": self.r_max, "d_max": self.d_max, "bn_steps": self.bn_steps, "ramp_steps": self.ramp_steps}
        return limits | {"momentum": self._momentum_given}

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return the scalars r_max and d_max of the next training batch."""
        seen = self._state("num_batches_tracked")
        step = (seen - self.start - self.bn_steps).to(at_least_float32(self.get_buffer("running_mean")).dtype)
        t = (step / self.ramp_steps).clamp(0, 1) if self.ramp_steps else (step >= 0).to(step.dtype)
        r = 1 / (1 - t) if math.isinf(self.r_max) else 1 + (self.r_max - 1) * t
        d = t / (1 - t) if math.isinf(self.d_max) else self.d_max * t
        return r, d

    def _normalize(self, x: Tensor) -> Normalized:
        mean, var = self._statistics()
        r_max, d_max = self.limits()
        new = self._is_new()
        r_max, d_max = torch.where(new, 1.0, r_max), torch.where(new, 0.0, d_max)
        return batch_renorm(x, mean, var, self.weight, self.bias, self.eps, r_max, d_max)

    def _seen(self) -> int:
        seen = self.get_buffer("num_batches_tracked")
        return 0 if seen.is_meta else int(seen)

    def _aside(self) -> dict[str, Any]:
        return {"start": self.start}

    def _take_aside(self, aside: dict[str, Any] | None) -> None:
        self.start = self._seen() if aside is None else int(aside["start"])

    def extra_repr(self) -> str:
        """Describe the layer in `print(model)`."""
        schedule = f"r_max={self.r_max:g}, d_max={self.d_max:g}, bn_steps={self.bn_steps}, ramp_steps={self.ramp_steps}"
        return f"{self.num_features}, {schedule}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}"


class BatchRenorm1d(BatchRenorm):
    """`BatchRenorm` for [N, C] or [N, C, L]."""

    _takes, _plain = (2, 3), nn.BatchNorm1d


class BatchRenorm2d(BatchRenorm):
    """`BatchRenorm` for [N, C, H, W]."""

    _takes, _plain = (4,), nn.BatchNorm2d


class BatchRenorm3d(BatchRenorm):
    """`BatchRenorm` for [N, C, D, H, W]."""

    _takes, _plain = (5,), nn.BatchNorm3d


def check_limits(r_max: object, d_max: object, bn_steps: object, ramp_steps: object) -> None:
    """Raise unless the limits and the steps are in their ranges."""
    for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= least:
            raise FinetuneBNError(complaint(name, value, f"a number from {least} on, or inf for no limit"))
    for name, value in (("bn_steps", bn_steps), ("ramp_steps", ramp_steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise FinetuneBNError(complaint(name, value, "a whole number from 0 on, in training batches"))


def check_momentum(momentum: object) -> None:
    """Raise unless `momentum` is a number from 0 to 1 or None."""
    if momentum is None or (
        isinstance(momentum, (int, float)) and not isinstance(momentum, bool) and 0 <= momentum <= 1
    ):
        return
    raise FinetuneBNError(complaint("momentum", momentum, "a number from 0 to 1, or None for the layers' own"))
