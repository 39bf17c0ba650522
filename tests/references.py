"""What the layers must compute, in numpy and float64, written down from the formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

Array = npt.NDArray[np.float64]


def as_array(tensor: Tensor) -> Array:
    """Return the values of a tensor of any dtype as float64."""
    return tensor.detach().double().cpu().numpy()


@dataclass(frozen=True)
class Values:
    """The tensors of a BatchNorm; `weight` and `bias` may be missing."""

    weight: Array | None
    bias: Array | None
    mean: Array
    var: Array
    eps: float

    @property
    def scale(self) -> Array:
        """gamma' = gamma / sqrt(var + eps)."""
        gamma = np.ones_like(self.mean) if self.weight is None else self.weight
        return gamma / np.sqrt(self.var + self.eps)

    @property
    def shift(self) -> Array:
        """beta' = beta - mean gamma'."""
        beta = np.zeros_like(self.mean) if self.bias is None else self.bias
        return beta - self.mean * self.scale

    def output(self, x: Array) -> Array:
        """y = gamma (x - mean) / sqrt(var + eps) + beta, in BN's own order of operations."""
        channels = (1, -1) + (1,) * (x.ndim - 2)
        y = (x - self.mean.reshape(channels)) / np.sqrt(self.var.reshape(channels) + self.eps)
        if self.weight is not None:
            y = y * self.weight.reshape(channels)
        return y if self.bias is None else y + self.bias.reshape(channels)

    def gradients(self, x: Array, upstream: Array) -> dict[str, Array]:
        """The gradients of sum(upstream * y) with respect to x, weight and bias."""
        channels = (1, -1) + (1,) * (x.ndim - 2)
        others = tuple(d for d in range(x.ndim) if d != 1)
        normalized = (x - self.mean.reshape(channels)) / np.sqrt(self.var.reshape(channels) + self.eps)
        return {
            "x": upstream * self.scale.reshape(channels),
            "weight": (upstream * normalized).sum(others),
            "bias": upstream.sum(others),
        }


def values_of(layer: Any) -> Values:
    """Return the tensors of a BatchNorm, live or frozen, in float64."""
    weight, bias = layer.weight, layer.bias
    return Values(
        None if weight is None else as_array(weight),
        None if bias is None else as_array(bias),
        as_array(layer.running_mean),
        as_array(layer.running_var),
        layer.eps,
    )
