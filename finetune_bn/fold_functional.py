"""A convolution or linear map with the affine of the BatchNorm (BN) behind it folded into its weight, step by step.

Per output channel c, with `scale` and `shift` of `functional.scale_shift`:

    conv(x, W, b) * scale + shift  =  conv(x, W * scale, b * scale + shift)

Tune mode of You et al., ICLR 2024 (arXiv 2305.11624), section 3: the same function with the same gradients, and nothing
of the size of an activation is computed or kept for it. Unlike there, `W * scale` is not kept either: backward makes it
anew from W, so that a training step keeps what the net without norm layers keeps. With w' = W * scale, b' and the
gradients G_w', G_b' of an ordinary convolution:

    G_W = G_w' * scale      G_b = G_b' * scale      G_scale = sum over the channel's weights G_w' * W + G_b' * b
    G_shift = G_b'

The fold is done in float32 or higher, also under autocast, and cast once. Gradients of any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune_bn.functional import at_least_float32


def folded_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool = False,
    output_padding: Sequence[int] = (),
    groups: int = 1,
) -> Tensor:
    """Return `conv(x, weight, bias) * scale + shift`, computed with a scaled weight.

    Args:
        x: input, [N, C_in, ...] with one, two or three dimensions behind the channels.
        weight: [C_out, C_in / groups, ...], for a transposed convolution [C_in, C_out / groups, ...].
        bias: [C_out], or None.
        scale: gamma', [C_out], float32 or higher.
        shift: beta', [C_out], float32 or higher.
        stride: as of `torch.convolution`, and so are the arguments behind it.
        padding: zeros on either side of each dimension.
        dilation: distance of the kernel's points.
        transposed: whether it is a transposed convolution.
        output_padding: of a transposed convolution.
        groups: number of groups.
    """
    x, dtype = _for_compute(x, weight)
    none = [0] * len(stride)
    geometry = (list(stride), list(padding), list(dilation), transposed, list(output_padding) or none, groups)
    return _FoldedConvolution.apply(x, weight, bias, scale, shift, dtype, *geometry)  # type: ignore[no-any-return]


def folded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    """Return `linear(x, weight, bias) * scale + shift`, computed with a scaled weight.

    Args:
        x: input, [..., C_in].
        weight: [C_out, C_in].
        bias: [C_out], or None.
        scale: gamma', [C_out], float32 or higher.
        shift: beta', [C_out], float32 or higher.
    """
    x, dtype = _for_compute(x, weight)
    return _FoldedLinear.apply(x, weight, bias, scale, shift, dtype)  # type: ignore[no-any-return]


def merged_weight(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, transposed: bool = False, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the map that computes `map(x, weight, bias) * scale + shift`, in the weight's dtype."""
    return _fold(weight, bias, scale, shift, _by_weight(scale, weight, transposed, groups), weight.dtype)


def _for_compute(x: Tensor, weight: Tensor) -> tuple[Tensor, torch.dtype]:
    """Return input and dtype that the map computes with: the weight's, or autocast's, which leaves float64 alone."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device)
        return x.to(dtype), dtype
    return x, weight.dtype


def _by_weight(scale: Tensor, weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """Return the scale of each output channel in a shape that multiplies the weight."""
    if not transposed:
        return scale.view(-1, *[1] * (weight.dim() - 1))
    of_groups = scale.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return of_groups.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))


def _by_channel(product: Tensor, transposed: bool, groups: int) -> Tensor:
    """Return the sums of a tensor like the weight over what belongs to one output channel, [C_out]."""
    if not transposed:
        return product.sum(list(range(1, product.dim())))
    of_pairs = product.flatten(2).sum(2)
    return of_pairs.view(groups, -1, of_pairs.shape[1]).sum(1).flatten()


def _fold(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, by_weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shift = shift if bias is None else bias * scale + shift
    return (at_least_float32(weight) * by_weight).to(dtype), shift.to(dtype)


def _keep(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> None:
    """Save for backward what the gradients asked for need, and no more."""
    of_x, of_weight, of_bias, of_scale = ctx.needs_input_grad[:4]
    ctx.save_for_backward(
        x if of_weight or of_scale else None,
        weight if of_x or of_scale else None,
        bias if of_scale else None,
        scale if of_x or of_weight or of_bias else None,
    )


def _unfold(
    ctx: Any,
    grad_folded: Tensor | None,
    grad_shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of weight, bias and scale from those of the folded weight and the folded bias."""
    _, of_weight, of_bias, of_scale = ctx.needs_input_grad[:4]
    grad_weight = grad_bias = grad_scale = None
    if grad_folded is not None:
        grad_folded = at_least_float32(grad_folded)
    if of_scale:
        assert grad_folded is not None
        assert weight is not None
        grad_scale = _by_channel(grad_folded * weight, transposed, groups)
        if bias is not None and grad_shift is not None:
            grad_scale = grad_scale + grad_shift * bias
    if of_weight:
        assert grad_folded is not None
        assert scale is not None
        by_weight = _by_weight(scale, grad_folded, transposed, groups)
        # Nobody else has the gradient yet: in place saves a tensor of the weight's size, unless it is differentiated.
        grad_weight = grad_folded * by_weight if torch.is_grad_enabled() else grad_folded.mul_(by_weight)
        grad_weight = grad_weight.to(ctx.weight_dtype)
    if of_bias:
        assert grad_shift is not None
        assert scale is not None
        grad_bias = (grad_shift * scale).to(ctx.bias_dtype)
    return grad_weight, grad_bias, grad_scale


def _sum_of_channels(ctx: Any, grad: Tensor, channel: int) -> Tensor | None:
    """Return the gradient of the folded bias, [C], in the dtype of the fold, where anything asks for it."""
    _, _, of_bias, of_scale, of_shift = ctx.needs_input_grad[:5]
    if not (of_bias or of_shift or (of_scale and ctx.bias_dtype is not None)):
        return None
    return grad.sum([d for d in range(grad.dim()) if d != channel % grad.dim()], dtype=ctx.fold_dtype)


class _FoldedConvolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        dtype: torch.dtype,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
    ) -> Tensor:
        by_weight = _by_weight(scale, weight, transposed, groups)
        w, b = _fold(weight, bias, scale, shift, by_weight, dtype)
        return torch.convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, scale, _, ctx.dtype, *ctx.geometry = inputs
        _keep(ctx, x, weight, bias, scale)
        ctx.x_shape = x.shape
        ctx.weight_shape = weight.shape
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.fold_dtype = scale.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale = ctx.saved_tensors
        transposed, groups = ctx.geometry[3], ctx.geometry[5]
        of_x, of_folded = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        grad_x = grad_folded = None
        if of_x or of_folded:
            # Where a tensor is only asked for its shape, one without memory will do.
            x = grad.new_empty(()).expand(ctx.x_shape) if x is None else x
            w = grad.new_empty(()).expand(ctx.weight_shape)
            if of_x:
                w = (at_least_float32(weight) * _by_weight(scale, weight, transposed, groups)).to(ctx.dtype)
            mask = [of_x, of_folded, False]
            grad_x, grad_folded, _ = torch.ops.aten.convolution_backward(grad, x, w, None, *ctx.geometry, mask)
        grad_shift = _sum_of_channels(ctx, grad, 1)
        of_rest = _unfold(ctx, grad_folded, grad_shift, weight, bias, scale, transposed, groups)
        return grad_x, *of_rest, grad_shift if ctx.needs_input_grad[4] else None, *[None] * 7


class _FoldedLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, dtype: torch.dtype
    ) -> Tensor:
        w, b = _fold(weight, bias, scale, shift, scale.view(-1, 1), dtype)
        return F.linear(x, w, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, scale, _, ctx.dtype = inputs
        _keep(ctx, x, weight, bias, scale)
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.fold_dtype = scale.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale = ctx.saved_tensors
        grad_x = grad_folded = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ (at_least_float32(weight) * scale.view(-1, 1)).to(ctx.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            grad_folded = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        grad_shift = _sum_of_channels(ctx, grad, -1)
        of_rest = _unfold(ctx, grad_folded, grad_shift, weight, bias, scale)
        return grad_x, *of_rest, grad_shift if ctx.needs_input_grad[4] else None, None
