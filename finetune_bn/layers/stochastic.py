"""Stochastic norm, which mixes batch and running statistics in training, and eval norm, which mixes in evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.functional.batch import Normalized, batch_norm, eval_norm, stochastic_norm
from finetune_bn.layers.extra_state import EXTRA_STATE, pack, unpack
from finetune_bn.layers.tracking import TrackingBatchNorm


class StochasticBatchNorm(TrackingBatchNorm):
    """Stochastic normalization (Kou et al. 2020, "Stochastic Normalization"), for inputs of shape [N, C, ...].

    In training each channel draws, batch by batch, whether it goes by the statistics of the batch, with probability
    `p`, or by the running ones. The running statistics follow the batch's in either case. Evaluation is BatchNorm's.

    A layer whose statistics are those of a new one (mean 0, variance 1, no batch seen) takes its first batch's.

    Args:
        num_features: number of channels C.
        p: probability that a channel goes by the batch; 1 is BatchNorm.
        eps: added to the variances.
        momentum: share of the new batch in the running statistics; None: their average over all batches.
        affine: whether there are `weight` and `bias`.
        device: where the tensors are made.
        dtype: dtype of the tensors.

    Raises:
        FinetuneBNError: `p` is no probability.
    """

    def __init__(
        self,
        num_features: int,
        p: float = 0.5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device, dtype)
        check_probability(p)
        self.p = p

    @classmethod
    def from_batch_norm(cls, bn: _BatchNorm, p: float = 0.5) -> Self:
        """Return the layer that stands for `bn`, with its very Parameters; ask `why_not_tracking` first."""
        check_probability(p)
        layer = cls._standing_for(bn)
        layer.p = p
        return layer

    @property
    def settings(self) -> dict[str, Any]:
        """What `from_batch_norm` takes besides the BatchNorm."""
        return {"p": self.p}

    def _normalize(self, x: Tensor) -> Normalized:
        mean, var = self._statistics()
        drawn = self._passes.draw(lambda: torch.rand(self.num_features, device=x.device))
        by_batch = (drawn < self.p) | self._is_new()
        return stochastic_norm(x, mean, var, self.weight, self.bias, self.eps, by_batch)


class StochasticBatchNorm1d(StochasticBatchNorm):
    """`StochasticBatchNorm` for [N, C] or [N, C, L]."""

    _takes, _plain = (2, 3), nn.BatchNorm1d


class StochasticBatchNorm2d(StochasticBatchNorm):
    """`StochasticBatchNorm` for [N, C, H, W]."""

    _takes, _plain = (4,), nn.BatchNorm2d


class StochasticBatchNorm3d(StochasticBatchNorm):
    """`StochasticBatchNorm` for [N, C, D, H, W]."""

    _takes, _plain = (5,), nn.BatchNorm3d


class EvalBatchNorm(TrackingBatchNorm):
    """BatchNorm that in evaluation counts in the image itself, for inputs of shape [N, C, ...].

    EvalNorm (Singh and Shrivastava 2019): in training an image is part of the batch that normalizes it, in evaluation
    it is not; in small batches that is a difference. Here, evaluation mixes the statistics of the image, with weight
    `alpha`, into the running ones, see `eval_norm` in `functional.batch`. Training is BatchNorm's.

    A BatchNorm's state dict loads `strict=True`. Its own has one entry more, `_extra_state`, which holds `alpha`: a
    BatchNorm, which would compute something else from it, refuses it.

    Args:
        num_features: number of channels C.
        alpha: weight of the image, 1 / (images in a training batch) as a rule; 0 is BatchNorm.
        eps: added to the variances.
        momentum: share of the new batch in the running statistics; None: their average over all batches.
        affine: whether there are `weight` and `bias`.
        device: where the tensors are made.
        dtype: dtype of the tensors.

    Raises:
        FinetuneBNError: `alpha` is not from 0 to less than 1.
    """

    def __init__(
        self,
        num_features: int,
        alpha: float,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device, dtype)
        check_alpha(alpha)
        self.alpha = alpha

    @classmethod
    def from_batch_norm(cls, bn: _BatchNorm, alpha: float) -> Self:
        """Return the layer that stands for `bn`, with its very Parameters; ask `why_not_tracking` first."""
        check_alpha(alpha)
        layer = cls._standing_for(bn)
        layer.alpha = alpha
        return layer

    @property
    def settings(self) -> dict[str, Any]:
        """What `from_batch_norm` takes besides the BatchNorm."""
        return {"alpha": self.alpha}

    @contextlib.contextmanager
    def as_batch_norm(self) -> Iterator[None]:
        """For the time of the block, evaluate as BatchNorm does."""
        alpha, self.alpha = self.alpha, 0.0
        try:
            yield
        finally:
            self.alpha = alpha

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.alpha:
            destination[prefix + EXTRA_STATE] = pack({"alpha": self.alpha}, {})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        packed = state_dict.pop(prefix + EXTRA_STATE, None)
        alpha: Any = self.alpha
        try:
            if packed is not None:
                alpha = unpack(packed)[0].get("alpha")
            check_alpha(alpha)
        except ValueError as error:
            rest[-1].append(f"{prefix[:-1] or '(root)'}: its state is of no EvalNorm layer: {error}")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.alpha = alpha

    def _normalize(self, x: Tensor) -> Normalized:
        return batch_norm(x, self.weight, self.bias, self.eps)

    def _evaluate(self, x: Tensor) -> Tensor:
        mean, var = self._statistics()
        return eval_norm(x, mean, var, self.weight, self.bias, self.eps, self.alpha)


class EvalBatchNorm1d(EvalBatchNorm):
    """`EvalBatchNorm` for [N, C] or [N, C, L]."""

    _takes, _plain = (2, 3), nn.BatchNorm1d


class EvalBatchNorm2d(EvalBatchNorm):
    """`EvalBatchNorm` for [N, C, H, W]."""

    _takes, _plain = (4,), nn.BatchNorm2d


class EvalBatchNorm3d(EvalBatchNorm):
    """`EvalBatchNorm` for [N, C, D, H, W]."""

    _takes, _plain = (5,), nn.BatchNorm3d


def check_probability(p: object) -> None:
    """Raise unless `p` is a number from 0 to 1."""
    if not isinstance(p, (int, float)) or isinstance(p, bool) or not 0 <= p <= 1:
        raise FinetuneBNError(complaint("p", p, "a number from 0 (running statistics) to 1 (those of the batch)"))


def check_alpha(alpha: object) -> None:
    """Raise unless `alpha` is a number from 0 on and less than 1."""
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 <= alpha < 1:
        raise FinetuneBNError(
            complaint("alpha", alpha, "a number from 0 to less than 1", "1 / (images in a training batch) is the rule.")
        )
