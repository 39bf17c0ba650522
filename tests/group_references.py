"""GroupNorm and its fit to a BatchNorm, in numpy and float64, written down from the formulas."""

from __future__ import annotations

import numpy as np

from tests.references import Array, Values


def normalized(x: Array, groups: int, eps: float) -> Array:
    """z = (x - mean) / sqrt(var + eps), mean and variance over the channels of a group and all positions."""
    rows = x.reshape(x.shape[0], groups, -1)
    mean, var = rows.mean(2, keepdims=True), rows.var(2, keepdims=True)
    return ((rows - mean) / np.sqrt(var + eps)).reshape(x.shape)


def affine(z: Array, weight: Array, bias: Array) -> Array:
    channels = (1, -1) + (1,) * (z.ndim - 2)
    return z * weight.reshape(channels) + bias.reshape(channels)


def closed_form(values: Values, groups: int) -> tuple[Array, Array]:
    """gamma_gn = s sqrt(var_g + eps), beta_gn = beta - s mu + s mu_g; channel by channel, with loops."""
    channels = len(values.mean)
    size = channels // groups
    weight, bias = np.empty(channels), np.empty(channels)
    for c in range(channels):
        mine = slice(c // size * size, c // size * size + size)
        group_mean = values.mean[mine].mean()
        group_var = values.var[mine].mean() + ((values.mean[mine] - group_mean) ** 2).mean()
        weight[c] = values.scale[c] * np.sqrt(group_var + values.eps)
        bias[c] = values.shift[c] + values.scale[c] * group_mean
    return weight, bias


def moment_match(z: Array, y: Array, sign: Array) -> tuple[Array, Array]:
    """gamma = sign sd(y) / sd(z) sqrt(r), beta = mean(y) - gamma mean(z); r the correlation, where it has the sign."""
    others = (0, *range(2, z.ndim))
    z_mean, y_mean = z.mean(others), y.mean(others)
    channels = (1, -1) + (1,) * (z.ndim - 2)
    dz, dy = z - z_mean.reshape(channels), y - y_mean.reshape(channels)
    correlation = (dz * dy).mean(others) / np.sqrt((dz**2).mean(others) * (dy**2).mean(others))
    weight = sign * y.std(others) / z.std(others) * np.sqrt(np.clip(sign * correlation, 0, 1))
    return weight, y_mean - weight * z_mean


def error(output: Array, y: Array) -> float:
    """Root mean square of the difference relative to the standard deviation of y, both over all channels."""
    others = (0, *range(2, y.ndim))
    return float(np.sqrt(((output - y) ** 2).mean(others).sum() / y.var(others).sum()))
