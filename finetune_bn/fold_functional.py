"""A convolution or linear map with the affine of the BatchNorm (BN) behind it folded into its weight, step by step.

Per output channel c, with `scale` and `shift` of `functional.scale_shift`:

    conv(x, W, b) * scale + shift  =  conv(x, W * scale, b * scale + shift)

Tune mode of You et al., ICLR 2024 (arXiv 2305.11624), section 3: the same function with the same gradients, and nothing
of the size of an activation is computed or kept for it. Unlike there, `W * scale` is not kept either: backward makes it
anew from W, so that a training step keeps what the net without norm layers keeps. With w' = W * scale, b' and the
gradients G_w', G_b' of an ordinary convolution:

    G_W = G_w' * scale      G_b = G_b' * scale      G_scale = sum over the channel's weights G_w' * W + G_b' * b
    G_shift = G_b'

Where the weight is larger than the result, as in late layers with few images, the result is scaled in its place, and
its gradient on the way back: the same numbers but for rounding, and nothing more is kept. So folding costs no more than
scaling either of the two.

The fold is done in float32 or higher, also under autocast, and cast once. Gradients of any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune_bn.functional import at_least_float32

# From the gradient of a map's result, a weight or None where only its shape is asked for, and whether the gradients of
# input and weight are wanted, those two.
_MapBackward = Callable[[Tensor, Tensor | None, bool, bool], tuple[Tensor | None, Tensor | None]]


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
    shift = shift if bias is None else bias * scale + shift
    return scaled_weight(weight, scale, transposed=transposed, groups=groups), shift.to(weight.dtype)


def scaled_weight(weight: Tensor, scale: Tensor, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """Return the weight of a map whose output channels are multiplied by `scale` [C_out], in the weight's dtype."""
    return (at_least_float32(weight) * _by_weight(scale, weight.shape, transposed, groups)).to(weight.dtype)


def _for_compute(x: Tensor, weight: Tensor) -> tuple[Tensor, torch.dtype]:
    """Return input and dtype that the map computes with: the weight's, or autocast's, which leaves float64 alone."""
    device = x.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if cast and x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device)
        return x.to(dtype), dtype
    return x, weight.dtype


def _by_weight(scale: Tensor, shape: torch.Size, transposed: bool, groups: int) -> Tensor:
    """Return the scale of each output channel in a shape that multiplies the weight."""
    if not transposed:
        return scale.view(-1, *[1] * (len(shape) - 1))
    of_groups = scale.view(groups, 1, -1).expand(groups, shape[0] // groups, -1)
    return of_groups.reshape(shape[0], -1, *[1] * (len(shape) - 2))


def _by_channel(a: Tensor, b: Tensor, transposed: bool, groups: int) -> Tensor:
    """Return the sums of `a * b`, both like the weight, over what belongs to one output channel, [C_out]."""
    if not transposed:
        return torch.linalg.vecdot(a.flatten(1), b.flatten(1))  # type: ignore[no-any-return]
    of_pairs = (a * b).flatten(2).sum(2)
    return of_pairs.view(groups, -1, of_pairs.shape[1]).sum(1).flatten()


def _can_divide(scale: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a gradient that was multiplied by `scale` in this dtype tells the one that was not.

    Where asking costs little: a GPU would have to be waited for, and a compiler cannot know.
    """
    if torch.compiler.is_compiling() or scale.device.type != "cpu" or dtype == torch.float16:
        return False
    try:
        return bool((scale.abs() > 1e-12).all())
    except RuntimeError:  # under torch.func.vmap a tensor has no one value
        return False


def _scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (at_least_float32(tensor) * factor).to(dtype)


def _result_size(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> int:
    """Return the number of elements that the convolution returns."""
    stride, padding, dilation, transposed, output_padding, groups = geometry
    size = x.shape[0] * (weight.shape[1] * groups if transposed else weight.shape[0])
    for n, k, s, p, d, more in zip(
        x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True
    ):
        reach = d * (k - 1)
        size *= (n - 1) * s - 2 * p + reach + more + 1 if transposed else (n + 2 * p - reach - 1) // s + 1
    return size


def _result_is_smaller(shape: torch.Size, size: int) -> bool:
    return shape.numel() > size


def _keep(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> None:
    """Save for backward what the gradients asked for need, and no more."""
    of_x, of_weight, of_bias, of_scale = ctx.needs_input_grad[:4]
    ctx.save_for_backward(
        x if of_weight or of_scale else None,
        weight if of_x or of_scale else None,
        bias if of_scale else None,
        scale if of_x or of_weight or of_bias else None,
    )


def _backward(
    ctx: Any,
    saved: Sequence[Any],
    grad: Tensor,
    dim: int,
    map_backward: _MapBackward,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias, scale and shift.

    Args:
        ctx: of the autograd function.
        saved: weight, bias and scale, each where `_keep` saved it.
        grad: gradient of the result.
        dim: the dimension of its channels.
        map_backward: returns the gradients of x and the weight of the map itself, from that of its result and a weight.
        transposed: as of the convolution.
        groups: as of the convolution.
    """
    weight, bias, scale = saved
    of_x, of_weight, of_bias, of_scale, of_shift = ctx.needs_input_grad[:5]
    of_result = [-1 if d == dim else 1 for d in range(grad.dim())]
    grad_x = grad_weight = grad_bias = grad_scale = grad_shift = by_weight = None
    divide = False
    if of_bias or of_shift or (of_scale and bias is not None):
        grad_shift = grad.sum([d for d in range(grad.dim()) if d != dim], dtype=ctx.fold_dtype)
    if of_weight or of_scale:
        by_weight = _by_weight(scale, ctx.weight_shape, transposed, groups) if of_weight else None
    if weight is not None and _result_is_smaller(ctx.weight_shape, grad.numel()):
        scaled = _scaled(grad, scale.view(of_result), ctx.dtype) if of_x else None
        divide = of_scale and scaled is not None and _can_divide(scale, ctx.dtype)
        if scaled is not None and (divide or not of_scale):
            grad_x, grad_weight = map_backward(scaled, weight.to(ctx.dtype), of_x, of_weight or of_scale)
            by_weight = None  # it is in the gradient already
        else:
            grad_x = None if scaled is None else map_backward(scaled, weight.to(ctx.dtype), True, False)[0]
            grad_weight = map_backward(grad, None, False, True)[1]
    elif of_x or of_weight or of_scale:
        w = _scaled(weight, _by_weight(scale, ctx.weight_shape, transposed, groups), ctx.dtype) if of_x else None
        grad_x, grad_weight = map_backward(grad, w, of_x, of_weight or of_scale)
    if grad_weight is not None:
        grad_weight = at_least_float32(grad_weight)
    if of_scale:
        assert grad_weight is not None
        grad_scale = _by_channel(grad_weight, weight.to(grad_weight.dtype), transposed, groups)
        if divide:
            grad_scale = grad_scale / scale
        if bias is not None:
            assert grad_shift is not None
            grad_scale = grad_scale + grad_shift * bias
    if of_weight:
        assert grad_weight is not None
        if by_weight is not None:
            # Nobody else has it yet: in place saves a tensor of the weight's size, unless this is differentiated.
            grad_weight = grad_weight * by_weight if torch.is_grad_enabled() else grad_weight.mul_(by_weight)
        grad_weight = grad_weight.to(ctx.weight_dtype)
    if of_bias:
        assert grad_shift is not None
        grad_bias = (grad_shift * scale).to(ctx.bias_dtype)
    return (
        grad_x if of_x else None,
        grad_weight if of_weight else None,
        grad_bias,
        grad_scale,
        grad_shift if of_shift else None,
    )


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
        geometry = stride, padding, dilation, transposed, output_padding, groups
        shift = shift if bias is None else bias * scale + shift
        if _result_is_smaller(weight.shape, _result_size(x, weight, geometry)):
            y = torch.convolution(x, weight.to(dtype), None, *geometry)
            per_channel = [1, -1] + [1] * (y.dim() - 2)
            return torch.addcmul(shift.view(per_channel), at_least_float32(y), scale.view(per_channel)).to(dtype)
        w = _scaled(weight, _by_weight(scale, weight.shape, transposed, groups), dtype)
        return torch.convolution(x, w, shift.to(dtype), *geometry)

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
        x, *saved = ctx.saved_tensors  # asked for once: gradient checkpointing forgets what it gave

        def map_backward(grad: Tensor, w: Tensor | None, of_x: bool, of_w: bool) -> tuple[Tensor | None, Tensor | None]:
            # Where a tensor is only asked for its shape, one without memory will do.
            wide = grad.new_empty(()).expand(ctx.x_shape) if x is None else x
            w = grad.new_empty(()).expand(ctx.weight_shape) if w is None else w
            both = torch.ops.aten.convolution_backward(grad, wide, w, None, *ctx.geometry, [of_x, of_w, False])
            return both[0], both[1]

        return *_backward(ctx, saved, grad, 1, map_backward, ctx.geometry[3], ctx.geometry[5]), *[None] * 7


class _FoldedLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, dtype: torch.dtype
    ) -> Tensor:
        shift = shift if bias is None else bias * scale + shift
        if _result_is_smaller(weight.shape, x.numel() // x.shape[-1] * weight.shape[0]):
            return torch.addcmul(shift, at_least_float32(F.linear(x, weight.to(dtype))), scale).to(dtype)
        return F.linear(x, _scaled(weight, scale.view(-1, 1), dtype), shift.to(dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, scale, _, ctx.dtype = inputs
        _keep(ctx, x, weight, bias, scale)
        ctx.weight_shape = weight.shape
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.fold_dtype = scale.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors  # asked for once: gradient checkpointing forgets what it gave

        def map_backward(grad: Tensor, w: Tensor | None, of_x: bool, of_w: bool) -> tuple[Tensor | None, Tensor | None]:
            grad_x = grad @ w if of_x and w is not None else None
            return grad_x, grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1]) if of_w else None

        return *_backward(ctx, saved, grad, grad.dim() - 1, map_backward), None
