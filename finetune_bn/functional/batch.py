"""The tensor maths of layers that normalize by part of a batch, by a mixture of statistics, or by noisy ones.

Notation as in `functional`, of which this is the continuation: x is [N, C, ...], statistics are [C], a missing
`weight` counts as ones and a missing `bias` as zeros. Statistics are float32 or wider whatever the dtype of x; dtype
and memory format of x are kept. Functions that normalize by the batch also return its mean and its variance divided
by n - 1, as BatchNorm (BN) stores it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune_bn.errors import FinetuneBNError
from finetune_bn.functional.frozen import at_least_float32, frozen_batch_norm, in_forward_mode, quickly_bound

Normalized = tuple[Tensor, Tensor, Tensor]


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance (divided by n) of each channel of `x` [N, C, ...]: [C] each, without a graph."""
    x = x.detach()
    if x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
        # BatchNorm's own kernel, several times faster than var_mean, which a compiler fuses; it answers in the dtype
        # of the buffers it is given, which it would update.
        unused = x.new_zeros(x.shape[1], dtype=_wide(x))
        mean, var = torch.batch_norm_update_stats(x, unused, unused.clone(), 0.0)
        return mean, var
    var, mean = torch.var_mean(at_least_float32(x), [d for d in range(x.dim()) if d != 1], correction=0)
    return mean, var


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Normalized:
    """Normalize `x` by its own statistics: BN in training mode, which needs more than one value a channel."""
    mean, var = (x.new_zeros(x.shape[1], dtype=_wide(x)) for _ in range(2))  # momentum 1 forgets what is in them
    y = F.batch_norm(x, mean, var, widened(weight), widened(bias), True, 1.0, eps)
    return y, mean, var


def ghost_batch_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Normalized:
    """Normalize each of the groups `x[i::groups]` by its own statistics (ghost batches, Hoffer et al. 2017).

    The mean and variance returned are those of the whole batch: the variance between the groups' means is part of it,
    which the average of the groups' variances leaves out. Where N is no multiple of `groups`, the first N % groups
    groups have one image more than the others; with fewer images than groups each image is a group.

    Args:
        x: [N, C, ...]; each group needs more than one value a channel.
        groups: number of groups.
        weight: gamma, [C].
        bias: beta, [C].
        eps: added to the variances.
    """
    normalize = _normalize_uneven_groups if x.shape[0] % groups else _normalize_even_groups
    y, counts, means, variances = normalize(x, groups, weight, bias, eps)
    mean, var = pooled(counts, means, variances)
    return _in_format_of(x, y), mean, var


def pooled(counts: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the values of all groups together, by the law of total variance.

    Args:
        counts: values of a channel in each group, [G, 1]; the others of an empty group do not count.
        means: [G, C].
        variances: divided by count, [G, C]; the one returned is divided by the total - 1.
    """
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return mean, (counts * (variances + (means - mean).square())).sum(0) / (total - 1)


def renorm_statistics(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, r_max: Tensor, d_max: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the mean and variance by which batch renormalization normalizes in its forward pass.

    Ioffe 2017, algorithm 1: ((x - mean) / sigma) r + d, r = clip(sigma / sigma_run, 1 / r_max, r_max),
    d = clip((mean - mean_run) / sigma_run, -d_max, d_max). Written as (x - m) / s with s = sigma / r and
    m = mean - d s it reads: by the running statistics, pulled towards the batch's where those are out of reach. In
    channels where nothing is clipped m and s are the running statistics to the last bit.

    Args:
        mean: of the batch, [C].
        var: of the batch, divided by n, [C].
        running_mean: [C].
        running_var: [C].
        eps: added to both variances.
        r_max: scalar, at least 1.
        d_max: scalar, at least 0.
    """
    running_mean, running_var = at_least_float32(running_mean), at_least_float32(running_var)
    sigma, running_sigma = torch.sqrt(var + eps), torch.sqrt(running_var + eps)
    r, d = sigma / running_sigma, (mean - running_mean) / running_sigma
    r_clipped, d_clipped = torch.clamp(r, 1 / r_max, r_max), torch.clamp(d, -d_max, d_max)
    s = sigma / r_clipped
    kept = r_clipped == r
    return (
        torch.where(kept & (d_clipped == d), running_mean, mean - d_clipped * s),
        torch.where(kept, running_var, s.square() - eps),
    )


def batch_renorm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    r_max: Tensor,
    d_max: Tensor,
) -> Normalized:
    """Normalize `x` by batch renormalization (Ioffe 2017); see `renorm_statistics`.

    r and d are constants in the backward pass, so the gradient for x is BN's: without its mean over the batch, and
    without its part along the normalized x. `r_max = d_max = inf`: the output is that of BN in eval mode bit for bit.
    `r_max = 1, d_max = 0`: the output is that of BN in training mode. Needs more than one value a channel.
    """
    if in_forward_mode():
        raise FinetuneBNError(
            "batch renormalization has no forward-mode derivative: its gradient is BatchNorm's, not that of its own "
            "forward pass. For a Hessian take torch.autograd.functional.hessian, or call eval() first."
        )
    mean, var = batch_statistics(x)
    by_mean, by_var = renorm_statistics(mean, var, running_mean, running_var, eps, r_max, d_max)
    y = _ProjectedBatchNorm.apply(x, widened(weight), widened(bias), by_mean, by_var, mean, var, eps)
    n = x.numel() // x.shape[1]
    return y, mean, var * (n / (n - 1))


@quickly_bound
class _ProjectedBatchNorm(torch.autograd.Function):
    """Forward: BN in eval mode by any statistics. Backward: as if they were r, d away from those of the batch."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        by_mean: Tensor,
        by_var: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
    ) -> Tensor:
        return F.batch_norm(x, by_mean, by_var, weight, bias, False, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, by_mean, by_var, mean, var, eps = inputs
        ctx.save_for_backward(x, weight, by_mean, torch.rsqrt(by_var + eps), mean, torch.rsqrt(var + eps))
        ctx.eps = eps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, by_mean, by_rsigma, mean, rsigma = ctx.saved_tensors
        r = by_rsigma / rsigma
        # BN's own backward kernel: it knows its second derivative, which a Hessian needs.
        grad_x, along, total = torch.ops.aten.native_batch_norm_backward(
            grad, x, r if weight is None else weight * r, None, None, mean, rsigma, True, ctx.eps, [True, True, True]
        )
        grad_weight = along * r + total * (mean - by_mean) * by_rsigma if ctx.needs_input_grad[1] else None
        grad_bias = total if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def stochastic_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    by_batch: Tensor,
) -> Normalized:
    """Normalize some channels by the batch and the others by the running statistics (Kou et al. 2020, section 3.2).

    Args:
        x: [N, C, ...], more than one value a channel.
        running_mean: [C].
        running_var: [C].
        weight: gamma, [C].
        bias: beta, [C].
        eps: added to the variances.
        by_batch: which channels go by the batch, bool [C].
    """
    live, mean, var = batch_norm(x, weight, bias, eps)
    fixed = frozen_batch_norm(x, running_mean, running_var, weight, bias, eps)
    return torch.where(by_batch.view(per_channel(x)), live, fixed), mean, var


def eval_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    alpha: float,
) -> Tensor:
    """Normalize each image by the statistics of the batch that it would have been part of in training.

    mean = alpha mean_image + (1 - alpha) running_mean (EvalNorm, Singh and Shrivastava 2019); for the variance the
    second moments are mixed in the same way (Summers and Dinneen 2020, section 3.1), so that what lies between the
    two means counts: alpha var_image + (1 - alpha) running_var + alpha (1 - alpha) (mean_image - running_mean)^2.
    `alpha = 0` is BN in eval mode bit for bit. No image depends on another.
    """
    if not alpha:
        return frozen_batch_norm(x, running_mean, running_var, weight, bias, eps)
    wide, shape = at_least_float32(x), per_channel(x)
    own_mean, own_var = wide, torch.zeros_like(wide)
    if x.dim() > 2:
        space = list(range(2, x.dim()))
        own_mean = wide.mean(space, keepdim=True)
        own_var = (wide - own_mean).square().mean(space, keepdim=True)
    away = own_mean - running_mean.view(shape)
    mean = running_mean.view(shape) + alpha * away
    var = alpha * own_var + (1 - alpha) * running_var.view(shape) + alpha * (1 - alpha) * away.square()
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight.view(shape)
    y = (wide - mean) * scale
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)


def image_spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return by how much images differ, which makes the statistics of a batch uncertain: [C] each, without a graph.

    The first is the variance over images of an image's mean, the second the variance over images of its mean square
    deviation, relative to the square of that. The mean of a batch of B i.i.d. images has the variance first / B,
    its variance the relative variance second / B, however much the pixels of an image have in common.

    Args:
        x: [N, C, ...] with N >= 2.
    """
    images, channels = x.shape[:2]
    means, variances = (t.view(images, channels) for t in batch_statistics(x.reshape(1, images * channels, -1)))
    of_mean, mean = torch.var_mean(means, 0)
    of_square, square = torch.var_mean(variances + (means - mean).square(), 0)
    return of_mean, of_square / square.square().clamp_min(torch.finfo(square.dtype).tiny)


def noisy_statistics(
    running_mean: Tensor, running_var: Tensor, spread: tuple[Tensor, Tensor], images: int
) -> tuple[Tensor, Tensor]:
    """Return statistics as a batch of so many i.i.d. images might have had, by the default random generator.

    Around the running statistics: the mean is normally, the variance log-normally distributed, with those as
    expectations; `spread` is what `image_spread` returns. Mean and variance are drawn independently of each other,
    which they are where the activations are symmetric about their mean.
    """
    mean, var = at_least_float32(running_mean), at_least_float32(running_var)
    log_var = torch.log1p(spread[1] / images)
    mean = mean + torch.sqrt(spread[0] / images) * torch.randn_like(mean)
    return mean, var * torch.exp(torch.sqrt(log_var) * torch.randn_like(var) - log_var / 2)


def values_per_image(x: Tensor) -> int:
    """Return how many values a channel of one image has: 1 for [N, C]."""
    return x.shape[2:].numel()


def per_channel(x: Tensor) -> list[int]:
    """Return the shape in which [C] numbers meet `x` [N, C, ...]."""
    return [1, -1] + [1] * (x.dim() - 2)


def _normalize_even_groups(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `x` normalized in groups of equal size, and their counts [groups, 1], means and variances [groups, C].

    Image j * groups + i belongs to group i, so in a contiguous tensor the groups lie beside each other as if they
    were channels: [N, C, ...] seen as [N / groups, groups * C, ...].
    """
    beside = x.reshape(-1, groups * x.shape[1], *x.shape[2:])
    weight, bias = (None if t is None else t.repeat(groups) for t in (weight, bias))
    y, mean, var = batch_norm(beside, weight, bias, eps)
    count = beside.shape[0] * values_per_image(x)
    means, variances = mean.view(groups, -1), var.view(groups, -1) * ((count - 1) / count)
    return y.view(x.shape), torch.full_like(means[:, :1], count), means, variances


def _normalize_uneven_groups(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do the same for groups of different sizes, also none; from each image's own moments."""
    wide, shape = at_least_float32(x), [x.shape[0], -1] + [1] * (x.dim() - 2)
    group = torch.arange(x.shape[0], device=x.device) % groups
    belongs = (group == torch.arange(groups, device=x.device).unsqueeze(1)).to(wide.dtype)
    images = belongs.sum(1, keepdim=True)
    shares = belongs / images.clamp_min(1)
    flat = wide.reshape(*x.shape[:2], -1)
    own_means = flat.mean(2)
    means = shares @ own_means
    spread = (flat - own_means.unsqueeze(2)).square().mean(2) + (own_means - means[group]).square()
    variances = shares @ spread
    scale = torch.rsqrt(variances + eps)
    if weight is not None:
        scale = scale * at_least_float32(weight)
    y = (wide - means[group].view(shape)) * scale[group].view(shape)
    if bias is not None:
        y = y + at_least_float32(bias).view(per_channel(x))
    return y.to(x.dtype), images * values_per_image(x), means.detach(), variances.detach()


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """Return `y` in the memory format of `x`."""
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and x.is_contiguous(memory_format=memory_format) and not x.is_contiguous():
            return y.contiguous(memory_format=memory_format)
    return y


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widened(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor in float32 or wider; None where there is none."""
    return None if tensor is None else at_least_float32(tensor)
