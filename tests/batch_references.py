"""What layers compute that normalize by other than the whole batch: numpy, float64, from the formulas, with loops."""

from __future__ import annotations

import numpy as np

from tests.references import Array, Values


def channels(numbers: Array, x: Array) -> Array:
    """[C] as it meets x [N, C, ...]."""
    return numbers.reshape((1, -1) + (1,) * (x.ndim - 2))


def mean_and_var(x: Array) -> tuple[Array, Array]:
    """Mean and variance (divided by n) of each channel."""
    others = tuple(d for d in range(x.ndim) if d != 1)
    return x.mean(others), x.var(others)


def unbiased_var(x: Array) -> Array:
    """Variance divided by n - 1, as BatchNorm stores it."""
    return x.var(tuple(d for d in range(x.ndim) if d != 1), ddof=1)


def moved(old: Array, new: Array, momentum: float) -> Array:
    """A running statistic after a batch."""
    return (1 - momentum) * old + momentum * new


def affine(values: Values, y: Array) -> Array:
    """gamma y + beta."""
    if values.weight is not None:
        y = y * channels(values.weight, y)
    return y if values.bias is None else y + channels(values.bias, y)


def ghost(values: Values, x: Array, groups: int) -> Array:
    """Each group x[i::groups] by its own statistics."""
    y = np.empty_like(x)
    for i in range(min(groups, len(x))):
        mean, var = mean_and_var(x[i::groups])
        y[i::groups] = (x[i::groups] - channels(mean, x)) / np.sqrt(channels(var, x) + values.eps)
    return affine(values, y)


def renorm(values: Values, x: Array, r_max: float, d_max: float) -> Array:
    """Ioffe 2017, algorithm 1."""
    mean, var = mean_and_var(x)
    sigma, running = np.sqrt(var + values.eps), np.sqrt(values.var + values.eps)
    r, d = np.clip(sigma / running, 1 / r_max, r_max), np.clip((mean - values.mean) / running, -d_max, d_max)
    return affine(values, (x - channels(mean, x)) / channels(sigma, x) * channels(r, x) + channels(d, x))


def renorm_gradients(values: Values, x: Array, upstream: Array, r_max: float, d_max: float) -> dict[str, Array]:
    """The gradients of sum(upstream * renorm(x)) with r and d constant; Ioffe 2017, section 3."""
    mean, var = mean_and_var(x)
    sigma, running = np.sqrt(var + values.eps), np.sqrt(values.var + values.eps)
    r, d = np.clip(sigma / running, 1 / r_max, r_max), np.clip((mean - values.mean) / running, -d_max, d_max)
    others = tuple(i for i in range(x.ndim) if i != 1)
    normalized = (x - channels(mean, x)) / channels(sigma, x)
    gamma = np.ones_like(mean) if values.weight is None else values.weight
    projected = (
        upstream - channels(upstream.mean(others), x) - normalized * channels((upstream * normalized).mean(others), x)
    )
    return {
        "x": channels(gamma * r / sigma, x) * projected,
        "weight": (upstream * (normalized * channels(r, x) + channels(d, x))).sum(others),
        "bias": upstream.sum(others),
    }


def stochastic(values: Values, x: Array, by_batch: Array) -> Array:
    """(1 - s) * by running statistics + s * by those of the batch; Kou et al. 2020, section 3.2."""
    mean, var = mean_and_var(x)
    live = (x - channels(mean, x)) / np.sqrt(channels(var, x) + values.eps)
    fixed = (x - channels(values.mean, x)) / np.sqrt(channels(values.var, x) + values.eps)
    s = channels(by_batch, x)
    return affine(values, (1 - s) * fixed + s * live)


def eval_norm(values: Values, x: Array, alpha: float) -> Array:
    """Image by image: moments of a population of which the share alpha is this image."""
    y = np.empty_like(x)
    for i, image in enumerate(x):
        flat = image.reshape(len(values.mean), -1)
        mean = alpha * flat.mean(1) + (1 - alpha) * values.mean
        second = alpha * (flat**2).mean(1) + (1 - alpha) * (values.var + values.mean**2)
        y[i : i + 1] = (x[i : i + 1] - channels(mean, x)) / np.sqrt(channels(second - mean**2, x) + values.eps)
    return affine(values, y)
