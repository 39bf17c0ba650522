"""A convolution or linear map with the affine of the BatchNorm (BN) behind it folded into its weight, step by step.

Per output channel c, with `scale` = gamma * rsigma and `shift` = beta - mean * scale:

    conv(x, W, b) * scale + shift  =  conv(x, W * scale, b * scale + shift)

Tune mode of You et al., ICLR 2024 (arXiv 2305.11624), section 3: the same function with the same gradients, and nothing
of the size of an activation is computed or kept for it. Unlike there, `W * scale` is not kept either: backward makes it
anew from W, so that a training step keeps what the net without norm layers keeps. `fold_gradients` has the gradients.

Where the weight is larger than the result, as in late layers with few images, the result is scaled in its place, and
its gradient on the way back: the same numbers but for rounding, and nothing more is kept. So folding costs no more than
scaling either of the two.

The fold is done in float32 or higher, also under autocast, and cast once. Gradients of any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune_bn.functional.fold_backward import (
    Saved,
    by_weight,
    constant_zeros,
    gradients,
    save_for_backward,
    scale_of,
    scaled,
)
from finetune_bn.functional.frozen import at_least_float32, quickly_bound

Check = Callable[[], None]
# Stride, padding, dilation, transposed, output padding, groups.
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], bool, Sequence[int], int]


class FixedNorm(NamedTuple):
    """What a BN of fixed statistics makes of z: `(z - mean) * rsigma * gamma + beta`.

    Attributes:
        gamma: [C] where it is trained; None where it is in `rsigma`.
        beta: [C], or None.
        mean: [C], float32 or higher; nobody may write to it, nor to `rsigma`.
        rsigma: 1 / sqrt(variance + eps), times the gamma that is not trained, [C], float32 or higher.
    """

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    rsigma: Tensor


def folded_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: FixedNorm,
    by_result: bool,
    geometry: Geometry,
    check: Check | None = None,
) -> Tensor:
    """Return `norm(conv(x, weight, bias))`.

    Args:
        x: input, [N, C_in, ...] with one, two or three dimensions behind the channels.
        weight: [C_out, C_in / groups, ...], for a transposed convolution [C_in, C_out / groups, ...].
        bias: [C_out], or None.
        norm: what the layer behind does, of C_out channels.
        by_result: whether the result is scaled, being smaller than the weight, and not the weight.
        geometry: what `torch.convolution` takes behind the bias.
        check: called at the begin of backward; may raise.
    """
    x, dtype = _for_compute(x, weight)
    return _FoldedConvolution.apply(x, weight, bias, *norm, dtype, by_result, check, *geometry)  # type: ignore[no-any-return]


def folded_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: FixedNorm, by_result: bool, check: Check | None = None
) -> Tensor:
    """Return `norm(linear(x, weight, bias))`.

    Args:
        x: input, [..., C_in].
        weight: [C_out, C_in].
        bias: [C_out], or None.
        norm: what the layer behind does, of C_out channels.
        by_result: whether the result is scaled, being smaller than the weight, and not the weight.
        check: called at the begin of backward; may raise.
    """
    x, dtype = _for_compute(x, weight)
    return _FoldedLinear.apply(x, weight, bias, *norm, dtype, by_result, check)  # type: ignore[no-any-return]


def result_size(
    shape: torch.Size,
    weight: torch.Size,
    sides: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> int:
    """Return the number of elements of a convolution's result, its input of this shape padded by `sides` first."""
    size, last = shape[0] * (weight[1] * groups if transposed else weight[0]), len(shape) - 1
    for i, (s, p, d) in enumerate(zip(stride, padding, dilation, strict=True)):
        n, reach = shape[2 + i], d * (weight[2 + i] - 1)
        if sides:  # the last dimension comes first
            at = 2 * (last - 2 - i)
            n += sides[at] + sides[at + 1]
        size *= (n - 1) * s - 2 * p + reach + output_padding[i] + 1 if transposed else (n + 2 * p - reach - 1) // s + 1
    return size


def merged_weight(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, transposed: bool = False, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the map that computes `map(x, weight, bias) * scale + shift`, in the weight's dtype."""
    shift = shift if bias is None else bias * scale + shift
    return scaled_weight(weight, scale, transposed=transposed, groups=groups), shift.to(weight.dtype)


def scaled_weight(weight: Tensor, scale: Tensor, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """Return the weight of a map whose output channels are multiplied by `scale` [C_out], in the weight's dtype."""
    return scaled(weight, by_weight(scale, weight.shape, transposed, groups), weight.dtype)


def _for_compute(x: Tensor, weight: Tensor) -> tuple[Tensor, torch.dtype]:
    """Return input and dtype that the map computes with: the weight's, or autocast's, which leaves float64 alone."""
    device = x.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if cast and x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device)
        return x.to(dtype), dtype
    return x, weight.dtype


def _scale_shift(
    bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, rsigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the map without its bias is multiplied by, and what is added then."""
    scale = scale_of(gamma, rsigma)
    offset = mean if bias is None else mean - bias
    if beta is None:
        return scale, -offset * scale
    return scale, torch.addcmul(at_least_float32(beta), offset, scale, value=-1)


@quickly_bound
class _FoldedConvolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        rsigma: Tensor,
        dtype: torch.dtype,
        by_result: bool,
        check: Check | None,
        *geometry: Any,
    ) -> Tensor:
        scale, shift = _scale_shift(bias, gamma, beta, mean, rsigma)
        if by_result:
            y = torch.convolution(x, weight.to(dtype), None, *geometry)
            per_channel = [1, -1] + [1] * (y.dim() - 2)
            return torch.addcmul(shift.view(per_channel), at_least_float32(y), scale.view(per_channel)).to(dtype)
        w = scaled(weight, by_weight(scale, weight.shape, geometry[3], geometry[5]), dtype)
        return torch.convolution(x, w, shift.to(dtype), *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.dtype, ctx.by_result, ctx.check = inputs[:10]
        ctx.geometry = inputs[10:]
        ctx.x_shape = inputs[0].shape
        save_for_backward(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors  # asked for once: gradient checkpointing forgets what it gave
        geometry = ctx.geometry

        def of_map(grad: Tensor, w: Tensor | None, *of: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            # Where a tensor is only asked for its shape, one without memory will do.
            wide = constant_zeros(grad, ctx.x_shape) if x is None else x
            w = constant_zeros(grad, ctx.weight_shape) if w is None else w
            channels = [grad.shape[1]] if of[2] else None
            return torch.ops.aten.convolution_backward.default(grad, wide, w, channels, *geometry, of)  # type: ignore[no-any-return]

        return *gradients(ctx, Saved(*saved), grad, 1, of_map, geometry[3], geometry[5]), *[None] * 11


@quickly_bound
class _FoldedLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        rsigma: Tensor,
        dtype: torch.dtype,
        by_result: bool,
        check: Check | None,
    ) -> Tensor:
        scale, shift = _scale_shift(bias, gamma, beta, mean, rsigma)
        if by_result:
            return torch.addcmul(shift, at_least_float32(F.linear(x, weight.to(dtype))), scale).to(dtype)
        return F.linear(x, scaled(weight, scale.view(-1, 1), dtype), shift.to(dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.dtype, ctx.by_result, ctx.check = inputs
        save_for_backward(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors  # asked for once: gradient checkpointing forgets what it gave

        def of_map(grad: Tensor, w: Tensor | None, *of: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            rows = grad.reshape(-1, grad.shape[-1])
            grad_x = grad @ w if of[0] and w is not None else None
            return grad_x, rows.T @ x.reshape(-1, x.shape[-1]) if of[1] else None, rows.sum(0) if of[2] else None

        return *gradients(ctx, Saved(*saved), grad, grad.dim() - 1, of_map), *[None] * 5
