"""The maths of balancing: factors for the channels in front of a GroupNorm with which it differs least from BatchNorm.

BatchNorm (BN) returns the same whatever each of its input channels is multiplied by, its statistics following.
GroupNorm (GN) does not: it subtracts an image's mean m over the channels of a group, and that is a loss as far as m
differs between images. So the factors of the channels are free to be chosen such that m hardly does: sizes make the
channels' variances alike, and signs make the channels' own means cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What the common size may be multiplied by; the error of a channel grows with one over its size.
_LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0)
# A channel that hardly varies is not blown up to the size of the others.
_SMALLEST = 1e-3
_LARGEST_POWER = 8
# What a move has to gain, and below what two are as good, relative to what is minimized.
_GAIN, _TIE = 1e-3, 1e-6
# Moves in a search, by channel; it ends far earlier.
_MOVES = 20


def balancing_factors(covariance: Tensor, variance: Tensor, importance: Tensor, groups: int = 1) -> Tensor:
    """Return the factors of the channels, [C] float64: powers of two with a sign, so that scaling by them is exact.

    What is minimized is the sum over groups of Var(m) times the sum of importance / size^2 of the group's channels,
    m the mean of the group's scaled channels in an image and size a factor relative to one over the channel's standard
    deviation: that of the error of the channels of GN's output, to first order, where GN's own variance is constant.
    One move at a time, the best one of all: a channel's factor becomes one of ten. From two starts, of which the
    better end is taken: equal signs, and signs that oppose each other.

    Args:
        covariance: covariance over images of the channels' means in an image, [C, C].
        variance: variance of each channel over images and positions, [C].
        importance: how much an error in each channel of GN's output matters, relative to its standard deviation, [C].
        groups: number of groups, a divisor of C.
    """
    device = covariance.device
    # Many small steps that depend on each other: no work for a GPU.
    covariance, variance, importance = (t.double().cpu() for t in (covariance, variance, importance))
    sizes = torch.exp2(-(variance + _SMALLEST * variance.max()).clamp_min(1e-30).log2().div(2).round())
    sizes = sizes / torch.exp2(sizes.median().log2())
    sizes = sizes.clamp(2.0**-_LARGEST_POWER, 2.0**_LARGEST_POWER)
    if groups == len(variance):
        return sizes.to(device)  # a channel alone in its group has no other to be balanced with
    covariance = covariance * sizes * sizes[:, None]
    weights = importance.clamp_min(1e-6 * float(importance.max().clamp_min(1e-30)))
    count = len(variance) // groups
    parts = []
    for begin in range(0, len(variance), count):
        part = slice(begin, begin + count)
        starts = torch.ones_like(weights[part]), _opposing(covariance[part, part])
        (value, first), (other, second) = (_search(covariance[part, part], weights[part], start) for start in starts)
        best = second if other < (1 - _TIE) * value else first
        parts.append(best * best[0].sign())  # all signs the other way round are as good: the first is to be positive
    return (torch.cat(parts) * sizes).to(device)


def _opposing(covariance: Tensor) -> Tensor:
    """Return signs, each against the sum of the channels before it, those that vary most first."""
    signs, along = torch.zeros_like(covariance[0]), torch.zeros_like(covariance[0])
    for channel in covariance.diagonal().argsort(descending=True, stable=True).tolist():
        signs[channel] = -1.0 if along[channel] > _TIE * covariance[channel, channel] else 1.0
        along = along + signs[channel] * covariance[channel]
    return signs


def _search(covariance: Tensor, weights: Tensor, factors: Tensor) -> tuple[float, Tensor]:
    """Return what is minimized and the relative factors of the channels of one group, from those given on."""
    levels = torch.tensor([sign * size for sign in (-1, 1) for size in _LEVELS], dtype=torch.float64)[:, None]
    weights = weights / weights.sum()
    penalties = weights / levels.square()
    along, diagonal = covariance @ factors, covariance.diagonal()
    spread, penalty = (along @ factors).clamp_min(0), weights.sum()
    for _ in range(_MOVES * len(weights)):
        step = levels - factors
        spreads = (spread + step * (2 * along + step * diagonal)).clamp_min(0)
        values = spreads * (penalty + penalties - weights / factors.square())
        now = spread * penalty
        # Of moves that are as good, as flipping either of two channels, the first: rounding is not to choose.
        best = int((values <= values.min() + _TIE * now).flatten().int().argmax())
        level, channel = divmod(best, len(weights))
        if not values[level, channel] < (1 - _GAIN) * now:
            break
        spread, penalty = spreads[level, channel], penalty + penalties[level, channel]
        penalty = penalty - weights[channel] / factors[channel].square()
        along = along + step[level, channel] * covariance[:, channel]
        factors[channel] = levels[level, 0]
    return float(spread * penalty), factors
