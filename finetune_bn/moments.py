"""Count, mean and sum of squared deviations (M2) per channel, and how they merge without losing digits.

Merging follows Chan, Golub and LeVeque 1983 ("Algorithms for computing the sample variance", eq. 2.1): the result does
not depend on how the data were cut, but for rounding. Sums of squares are never kept: E[x^2] - E[x]^2 cancels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune_bn.errors import FinetuneBNError, complaint


@dataclass(frozen=True)
class Moments:
    """What is known of some values of each channel.

    Attributes:
        count: number of values of a channel (images times positions), float64 scalar; exact up to 2^53.
        mean: [C], float64.
        m2: sum of squared deviations from `mean`, [C], float64, never negative.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Return the moments of `x` [N, C, ...], over all dimensions but the second.

        Deviations are taken from a value of the channel itself before they are summed, so that a mean that is large
        against the standard deviation costs no digits, in float16 and bfloat16 input neither.

        Raises:
            FinetuneBNError: `x` has no channel dimension, or no values.
        """
        if x.dim() < 2 or not x.numel():
            raise FinetuneBNError(complaint("x", tuple(x.shape), "[N, C, ...] with at least one value a channel"))
        channels = x.detach().transpose(0, 1).reshape(x.shape[1], -1)
        pivot = channels[:, :1].to(accumulator(x))
        variance, mean = torch.var_mean(channels.to(accumulator(x)) - pivot, dim=1, correction=0)
        count = torch.tensor(float(channels.shape[1]), dtype=torch.float64, device=x.device)
        return cls(count, pivot[:, 0].double() + mean.double(), variance.double() * count)

    @classmethod
    def of_statistics(cls, mean: Tensor, var: Tensor, count: float) -> Moments:
        """Return the moments of `count` values with this mean and biased variance, [C] each."""
        number = torch.tensor(float(count), dtype=torch.float64, device=mean.device)
        return cls(number, mean.double(), var.double() * number)

    @classmethod
    def none(cls, channels: int, device: torch.device | str | None = None) -> Moments:
        """Return the moments of no values, the neutral element of `merge`."""
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(torch.zeros((), dtype=torch.float64, device=device), zeros, zeros.clone())

    def merge(self, other: Moments) -> Moments:
        """Return the moments of the values of both."""
        count = self.count + other.count
        share = torch.where(count > 0, other.count / count, torch.zeros_like(count))
        delta = other.mean - self.mean
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + delta.square() * self.count * share)

    def var(self, correction: int = 0) -> Tensor:
        """Return the variance [C], float64: divided by `count` as BN normalizes, or by `count - 1` as BN stores it."""
        return self.m2 / (self.count - correction)

    @property
    def is_finite(self) -> bool:
        """Whether no value was NaN or infinite."""
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self.m2).all())

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Moments:
        """Return the moments of the values of all processes, the same numbers on each; ranks may have any count.

        Without a process group that is initialized, these moments themselves. A rank without data takes part with
        `none`. Gathered and merged in the order of the ranks, not summed: a sum would have to be centered anew.
        """
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return self
        world = torch.distributed.get_world_size(group)
        if world == 1:
            return self
        packed = torch.cat([self.count.reshape(1), self.mean, self.m2])
        gathered = [torch.empty_like(packed) for _ in range(world)]
        torch.distributed.all_gather(gathered, packed, group)
        channels = self.mean.numel()
        return merge_all(Moments(p[0], p[1 : 1 + channels], p[1 + channels :]) for p in gathered)


def merge_all(parts: Iterable[Moments]) -> Moments:
    """Return the moments of all values of the parts, merged pairwise so that rounding grows with the logarithm."""
    level = list(parts)
    if not level:
        raise FinetuneBNError(complaint("parts", [], "at least one"))
    while len(level) > 1:
        pairs = [a.merge(b) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(level) - len(level) % 2 :]
    return level[0]


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype in which values of `x` are summed: float32, or float64 where `x` is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
