"""Backward of a convolution or linear map that holds the affine of the BatchNorm (BN) behind it, see `fold_functional`.

With w' = W * scale and the gradients G_w', G_shift of an ordinary convolution's weight and bias, all per channel:

    G_W = G_w' * scale                  G_scale = sum over the channel's weights G_w' * W + G_shift * (b - mean)
    G_b = G_shift * scale               G_gamma = G_scale * rsigma
    G_beta = G_shift

Where the result was scaled and not the weight, the gradient of the result is multiplied by `scale` first. One backward
of the map then gives G_W itself, and G_w' is that divided by `scale`, where no scale is next to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune_bn.functional.frozen import at_least_float32

# From the gradient of a map's result, a weight or None where only its shape is asked for, and whether the gradients of
# input, weight and bias are wanted, those three.
MapBackward = Callable[[Tensor, Tensor | None, bool, bool, bool], tuple[Tensor | None, Tensor | None, Tensor | None]]


class Saved(NamedTuple):
    """What forward keeps besides the input: each tensor where the gradients asked for need it."""

    weight: Any
    bias: Any
    gamma: Any
    mean: Any
    rsigma: Any


def save_for_backward(
    ctx: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    rsigma: Tensor,
) -> None:
    """Save for backward what the gradients asked for need, and no more."""
    of_x, of_weight, of_bias, of_gamma, _ = ctx.needs_input_grad[:5]
    of_scale = of_x or of_weight or of_bias or of_gamma
    ctx.save_for_backward(
        x if of_weight or of_gamma else None,
        weight if of_x or of_gamma else None,
        bias if of_gamma else None,
        gamma if of_scale else None,
        mean if of_gamma else None,
        rsigma if of_scale else None,
    )
    ctx.weight_shape = weight.shape
    ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias, gamma, beta, rsigma)]


def gradients(
    ctx: Any,
    saved: Saved,
    grad: Tensor,
    dim: int,
    of_map: MapBackward,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias, gamma and beta.

    Args:
        ctx: of the autograd function.
        saved: what `save_for_backward` saved.
        grad: gradient of the result.
        dim: the dimension of its channels.
        of_map: backward of the map itself.
        transposed: as of the convolution.
        groups: as of the convolution.
    """
    if ctx.check is not None:
        ctx.check()
    weight, bias, gamma, mean, rsigma = saved
    of_x, of_weight, of_bias, of_gamma, of_beta = ctx.needs_input_grad[:5]
    weight_dtype, bias_dtype, gamma_dtype, beta_dtype, dtype = ctx.dtypes
    scale = None if rsigma is None else scale_of(gamma, rsigma)
    grad_x = grad_weight = grad_shift = grad_scale = factor = None
    divide = False
    of_shift = of_bias or of_gamma or of_beta
    along = of_shift and ctx.dtype == dtype  # it comes along with the other two, for less than a pass of its own
    if of_x or of_weight or of_gamma:
        assert scale is not None
        if ctx.by_result and weight is not None:
            of_result = [-1 if d == dim else 1 for d in range(grad.dim())]
            multiplied = scaled(grad, scale.view(of_result), ctx.dtype) if of_x else None
            divide = of_gamma and multiplied is not None and can_divide(scale, ctx.dtype)
            if multiplied is not None and (divide or not of_gamma):
                w = weight.to(ctx.dtype)
                grad_x, grad_weight, grad_shift = of_map(multiplied, w, of_x, of_weight or of_gamma, along and divide)
                grad_shift = grad_shift / scale if along and divide and grad_shift is not None else None
            else:
                if multiplied is not None:
                    grad_x = of_map(multiplied, weight.to(ctx.dtype), True, False, False)[0]
                _, grad_weight, grad_shift = of_map(grad, None, False, True, along)
                factor = by_weight(scale, ctx.weight_shape, transposed, groups)
        else:
            factor = by_weight(scale, ctx.weight_shape, transposed, groups)
            w = scaled(weight, factor, ctx.dtype) if of_x else None
            grad_x, grad_weight, grad_shift = of_map(grad, w, of_x, of_weight or of_gamma, along)
    if of_shift and (grad_shift is None or not along):
        grad_shift = grad.sum([d for d in range(grad.dim()) if d != dim], dtype=dtype)
    if grad_weight is not None:
        grad_weight = at_least_float32(grad_weight)
    if of_gamma:
        assert scale is not None
        assert grad_weight is not None
        assert grad_shift is not None
        grad_scale = by_channel(grad_weight, weight.to(grad_weight.dtype), transposed, groups)
        if divide:
            grad_scale = grad_scale / scale
        grad_scale = torch.addcmul(grad_scale, grad_shift, mean if bias is None else mean - bias, value=-1)
        grad_scale = (grad_scale * rsigma).to(gamma_dtype)
    if of_weight:
        assert grad_weight is not None
        if factor is not None:
            # Nobody else has it yet: in place saves a tensor of the weight's size, unless this is differentiated.
            grad_weight = grad_weight * factor if torch.is_grad_enabled() else grad_weight.mul_(factor)
        grad_weight = grad_weight.to(weight_dtype)
    return (
        grad_x if of_x else None,
        grad_weight if of_weight else None,
        (grad_shift * scale).to(bias_dtype) if of_bias and grad_shift is not None and scale is not None else None,
        grad_scale,
        grad_shift.to(beta_dtype) if of_beta and grad_shift is not None else None,
    )


def scale_of(gamma: Tensor | None, rsigma: Tensor) -> Tensor:
    """Return what a channel is multiplied by."""
    return rsigma if gamma is None else at_least_float32(gamma) * rsigma


def by_weight(scale: Tensor, shape: torch.Size, transposed: bool, groups: int) -> Tensor:
    """Return the scale of each output channel in a shape that multiplies the weight."""
    if not transposed:
        return scale.view(-1, *[1] * (len(shape) - 1))
    of_groups = scale.view(groups, 1, -1).expand(groups, shape[0] // groups, -1)
    return of_groups.reshape(shape[0], -1, *[1] * (len(shape) - 2))


def by_channel(a: Tensor, b: Tensor, transposed: bool, groups: int) -> Tensor:
    """Return the sums of `a * b`, both like the weight, over what belongs to one output channel, [C_out]."""
    if not transposed:
        return torch.linalg.vecdot(a.flatten(1), b.flatten(1))  # type: ignore[no-any-return]
    of_pairs = (a * b).flatten(2).sum(2)
    return of_pairs.view(groups, -1, of_pairs.shape[1]).sum(1).flatten()


def can_divide(scale: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a gradient that was multiplied by `scale` in this dtype tells the one that was not.

    Where asking costs little: a GPU would have to be waited for, and a compiler cannot know.
    """
    if torch.compiler.is_compiling() or scale.device.type != "cpu" or dtype == torch.float16:
        return False
    try:
        return bool((scale.abs() > 1e-12).all())
    except RuntimeError:  # under torch.func.vmap a tensor has no one value
        return False


def scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor * factor`, computed in float32 or higher."""
    return (at_least_float32(tensor) * factor).to(dtype)


def constant_zeros(like: Tensor, shape: torch.Size) -> Tensor:
    """Return a tensor that takes the memory of one element."""
    return like.new_zeros(()).expand(shape)
