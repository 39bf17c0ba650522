"""How far the statistics of some activations are from those that a layer keeps."""

from __future__ import annotations

import torch
from torch import Tensor


def normal_divergence(mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor, eps: float) -> Tensor:
    """Return the Kullback-Leibler divergence of normal distributions from others, averaged over channels.

    For each channel `(r - 1 - log r + d^2) / 2` with r the ratio of the variances and d the distance of the means in
    standard deviations of the other: 0 where they are the same, and what the data of the first lose in likelihood, in
    nats a value, where they are taken for data of the other. Distances between BatchNorm statistics that tell domains
    apart: Segu, Tonioni and Tombari 2020, "Batch Normalization Embeddings for Deep Domain Generalization".

    Args:
        mean: float [..., C].
        var: float [..., C], 0 or more.
        other_mean: float [..., C]; shapes are broadcast.
        other_var: float [..., C], 0 or more.
        eps: added to both variances, as BatchNorm does.

    Returns:
        float [...], 0 or more.
    """
    other = other_var + eps
    excess = (var - other_var) / other  # r - 1, without rounding where r is near 1
    shift = (mean - other_mean).square() / other
    # log1p(excess) <= excess, but for rounding
    return torch.clamp_min(excess - torch.log1p(excess) + shift, 0.0).mean(dim=-1) / 2
