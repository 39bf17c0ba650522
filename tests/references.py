"""What the layers must compute, in numpy and float64, written down from the formulas."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

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


def layer_by_layer(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Array, Array]]:
    """Return mean and unbiased variance at the input of each BatchNorm, each measured when those before it are final.

    Sequential re-estimation: one eval-mode forward pass of all images a layer, in the order in which the layers are
    called, no further than to that layer. The passes are in `dtype`, the statistics in float64. The model itself is
    left as it is.
    """
    model = copy.deepcopy(model).to(dtype).eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    order: list[str] = []
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda module, args, name=name: order.append(name))
    found: dict[str, tuple[Array, Array]] = {}
    with torch.no_grad():
        model(x.to(dtype))
        for name in dict.fromkeys(order):
            mean, var = _statistics_at(layers[name], model, x.to(dtype))
            layers[name].running_mean.copy_(torch.from_numpy(mean))
            layers[name].running_var.copy_(torch.from_numpy(var))
            found[name] = (mean, var)
    return found


class _Arrived(Exception):
    """The images are at the layer in question; what lies behind it need not run."""


def _statistics_at(layer: nn.Module, model: nn.Module, x: Tensor) -> tuple[Array, Array]:
    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Arrived(args[0])

    handle = layer.register_forward_pre_hook(stop)
    try:
        model(x)
    except _Arrived as arrived:
        values = as_array(arrived.args[0])
    finally:
        handle.remove()
    values = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
    mean = values.mean(1)
    return mean, ((values - mean[:, None]) ** 2).sum(1) / (values.shape[1] - 1)
