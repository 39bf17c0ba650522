"""Frozen BatchNorm that keeps the noise which a batch's statistics have, without depending on the batch."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.functional.batch import image_spread, noisy_statistics, widened
from finetune_bn.functional.frozen import frozen_batch_norm
from finetune_bn.layers.frozen import (
    Affine,
    FrozenBatchNorm,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    check_affine,
)
from finetune_bn.layers.leaf import as_leaf
from finetune_bn.layers.recomputed import Passes
from finetune_bn.layers.tracking import KeepsAside

# The spread is an average over about so many batches: it follows the weights as they are trained.
_MEMORY = 100
_MEASURED = ("spread_of_mean", "spread_of_square", "batches_measured")


class NoisyFrozenBatchNorm(KeepsAside, FrozenBatchNorm):
    """`FrozenBatchNorm` whose statistics are, in training, drawn anew for each batch around the fixed ones.

    They scatter as in i.i.d. batches of `noise` images: BatchNorm's regularization, but no image depends on another.
    How much images differ is measured on the way, channel by channel, in the training batches before the present one
    (about the last 100); so the first batch has no noise, and a batch of one image tells nothing. The images of a
    batch share the draw, as they do in BatchNorm. In eval mode it is `FrozenBatchNorm` to the last bit.

    What was measured is kept in the metadata of the state dict, whose names stay BatchNorm's.

    Args:
        num_features: number of channels C.
        eps: added to `running_var`.
        momentum: kept for the BN that `to_batch_norm` makes; not used here.
        affine: what is trained, see `FrozenBatchNorm`; not `merged`, which has no statistics of its own.
        device: where the tensors are made.
        dtype: dtype of the tensors.
        noise: images of the batch whose noise it is, 2 or more.

    Raises:
        FinetuneBNError: `noise` is no whole number from 2 on, or `affine` is `merged`.
    """

    spread_of_mean: Tensor
    spread_of_square: Tensor
    batches_measured: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: Affine = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        noise: int = 32,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device=device, dtype=dtype)
        self._begin(noise)

    @classmethod
    def from_batch_norm(cls, bn: _BatchNorm, affine: Affine = "none", noise: int = 32) -> Self:
        """Return the layer of the same eval-mode function, see `FrozenBatchNorm.from_batch_norm`."""
        check_affine(affine)
        check_noise(noise, affine)
        frozen = super().from_batch_norm(bn, affine)
        frozen._begin(noise)
        return frozen

    def _begin(self, noise: int) -> None:
        check_noise(noise, self.affine_kind)
        self.noise = noise
        self._passes = Passes()
        like = self.running_mean
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        for name in ("spread_of_mean", "spread_of_square"):
            self.register_buffer(name, torch.zeros_like(like, dtype=wide), persistent=False)
        count = torch.zeros((), dtype=torch.long, device=like.device)
        self.register_buffer("batches_measured", count, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` [N, C, ...] normalized, in training by noisy statistics, in the dtype and memory format of `x`."""
        if not isinstance(x, Tensor):
            return as_leaf(self, x)
        self._check_input_dim(x)
        return self._normalize(x)

    def _normalize(self, x: Tensor) -> Tensor:
        if not self.training:
            return frozen_batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        spread = self.spread_of_mean, self.spread_of_square
        self._passes.begin(x, {}, type(self).__name__)
        statistics = self.running_mean, self.running_var
        mean, var = self._passes.draw(lambda: noisy_statistics(*statistics, spread, self.noise))
        if not self._passes.repeats:
            self._measure(x)
        # These statistics are in float32 also where the layer's are not, and all four must be of one dtype.
        return frozen_batch_norm(x, mean, var, widened(self.weight), widened(self.bias), self.eps)

    @torch.no_grad()
    def _measure(self, x: Tensor) -> None:
        if x.shape[0] < 2:
            return
        share = 1.0 / self.batches_measured.add_(1).clamp_max(_MEMORY)
        for old, new in zip((self.spread_of_mean, self.spread_of_square), image_spread(x), strict=True):
            old.lerp_(new.to(old.dtype), share.to(old.dtype))

    def _aside(self) -> dict[str, Any]:
        return {name: self.get_buffer(name).clone() for name in _MEASURED}

    def _take_aside(self, aside: dict[str, Any] | None) -> None:
        self._begin(self.noise)
        for name, value in (aside or {}).items():
            self.get_buffer(name).copy_(value)

    def extra_repr(self) -> str:
        """Describe the layer in `print(model)`."""
        return f"{super().extra_repr()}, noise={self.noise}"


class NoisyFrozenBatchNorm1d(NoisyFrozenBatchNorm, FrozenBatchNorm1d):
    """`NoisyFrozenBatchNorm` for [N, C] or [N, C, L]."""


class NoisyFrozenBatchNorm2d(NoisyFrozenBatchNorm, FrozenBatchNorm2d):
    """`NoisyFrozenBatchNorm` for [N, C, H, W]."""


class NoisyFrozenBatchNorm3d(NoisyFrozenBatchNorm, FrozenBatchNorm3d):
    """`NoisyFrozenBatchNorm` for [N, C, D, H, W]."""


def check_noise(noise: object, affine: str) -> None:
    """Raise unless `noise` is a number of images, and `affine` goes with noise."""
    if not isinstance(noise, int) or isinstance(noise, bool) or noise < 2:
        raise FinetuneBNError(complaint("noise", noise, "a whole number of images from 2 on", "32 is usual."))
    if affine == "merged":
        raise FinetuneBNError(
            complaint("noise", noise, "none with affine='merged'", "It keeps no statistics: take affine='original'.")
        )
