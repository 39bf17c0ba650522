"""The tensor maths of a BatchNorm (BN) layer with fixed statistics, free of modules.

Notation, per channel c of an input of shape [N, C, ...]:

    scale = weight * rsqrt(running_var + eps)        (gamma')
    shift = bias - running_mean * scale              (beta')
    y     = x * scale + shift

A missing `weight` counts as ones, a missing `bias` as zeros, as in `torch.nn.functional.batch_norm`.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_Function = TypeVar("_Function", bound=type[torch.autograd.Function])
_ANY_ARGUMENTS = inspect.Signature([inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL)])

# Largest |a - b| / max|b| between the outputs of two networks that compute the same function in another order.
# The one place for it: conversions, tests and scripts all compare by this table.
TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}


def scale_shift(
    weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (gamma', beta') of a BN in eval mode, each of shape [C] and in float32 or higher.

    Differentiable in `weight` and `bias`.
    """
    scale = scale_of(weight, running_var, eps)
    shift = -at_least_float32(running_mean) * scale
    if bias is not None:
        shift = at_least_float32(bias) + shift
    return scale, shift


def scale_of(weight: Tensor | None, running_var: Tensor, eps: float) -> Tensor:
    """Return gamma' of a BN in eval mode, [C], in float32 or higher."""
    scale = torch.rsqrt(at_least_float32(running_var) + eps)
    return scale if weight is None else at_least_float32(weight) * scale


def solve_affine(
    scale: Tensor, shift: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the (weight, bias) with which a BN of the given statistics computes `x * scale + shift`.

    The inverse of `scale_shift`; float32 or higher.
    """
    mean, var = at_least_float32(running_mean), at_least_float32(running_var)
    return scale * torch.sqrt(var + eps), shift + mean * scale


def canonical_statistics(running_mean: Tensor, running_var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the statistics under which `weight` is gamma' and `bias` is beta': mean 0, variance 1 - eps.

    `1 - eps` and not 1, because BN adds `eps` again: in float32 and float64 their sum rounds to exactly 1.
    """
    return torch.zeros_like(running_mean), torch.full_like(running_var, 1.0 - eps)


def is_canonical(running_mean: Tensor, running_var: Tensor, eps: float) -> bool:
    """Tell whether the statistics are those of `canonical_statistics`, bit for bit."""
    mean, var = canonical_statistics(running_mean, running_var, eps)
    return torch.equal(running_mean, mean) and torch.equal(running_var, var)


def canonicalize(
    weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (weight, bias, running_mean, running_var) of the same function with canonical statistics.

    Idempotent: values that are canonical already come back bit for bit. The dtypes are kept.
    """
    if is_canonical(running_mean, running_var, eps):
        return weight, bias, running_mean, running_var
    mean, var = canonical_statistics(running_mean, running_var, eps)
    # In float64 and rounded once: CPU and GPU come to the same numbers, by which `revert` tells what was trained.
    given = [in_float64(t) for t in (weight, bias, running_mean, running_var)]
    scale, shift = scale_shift(*given, eps)  # type: ignore[call-arg, arg-type]
    # In half precision 1 - eps + eps is not 1: solving for the statistics as stored keeps the function all the same.
    new_weight, new_bias = solve_affine(scale, shift, in_float64(mean), in_float64(var), eps)
    return new_weight.to(weight), new_bias.to(bias), mean, var


def in_transform() -> bool:
    """Tell whether a transform of `torch.func` is running: vmap, grad, jvp and what is made of them."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Tell whether forward-mode derivatives are being taken, which an autograd function of ours does not know."""
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


def loose(y: Tensor) -> Tensor:
    """Return what an autograd function returned, in a form that an activation in place may write to."""
    return y.clone() if in_transform() else y  # under vmap it is a view


def frozen_batch_norm(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalize `x` of shape [N, C, ...] by fixed statistics: BN in eval mode, bit for bit.

    The forward pass *is* PyTorch's eval-mode kernel: parameters in float32 act on bfloat16 or float16 activations
    in float32, and dtype and memory format of `x` are kept. What differs is backward: `F.batch_norm` keeps `x`
    even where nothing needs it, this keeps [C] numbers unless `weight` is being trained; and where the gradient of a
    single image comes in other strides than the image, PyTorch's CPU kernel returns wrong numbers, which this does not
    (2.14: a `flatten(2).transpose(1, 2)` behind the layer). Reverse mode may be nested as deep as wanted; in forward
    mode (`torch.func.jvp`, `torch.func.hessian`) it is PyTorch's own in all.
    """
    if not torch.jit.is_scripting():  # by itself: only so does torch.jit.script leave out what it cannot read
        return _batch_norm(x, running_mean, running_var, weight, bias, eps)
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)


def _batch_norm(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    # What is captured to be deployed is to hold BatchNorm, which every backend knows.
    captured = torch.jit.is_tracing() or torch.compiler.is_exporting()  # type: ignore[no-untyped-call]
    if torch.is_grad_enabled() and not captured and not in_forward_mode():
        # What backward needs is made afresh in each call: in-place writes to the buffers between forward and
        # backward (DDP broadcasts them) cannot invalidate it.
        if weight is not None and weight.requires_grad:
            mean, var = running_mean.clone(), running_var.clone()
            return loose(_LearnableScaleBatchNorm.apply(x, bias, weight, mean, var, eps))
        if x.requires_grad or (bias is not None and bias.requires_grad):
            scale = scale_of(weight, running_var, eps).to(x.dtype)
            return loose(_ConstantScaleBatchNorm.apply(x, bias, scale, running_mean, running_var, weight, eps))
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)


def eval_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias of BN in eval mode, by PyTorch's kernel.

    Args:
        grad: gradient of the output, [N, C, ...]; it is given to the kernel in the strides of `x`.
        x: the input. Where the gradient of the weight is not needed its values are not read.
        weight: [C], or None.
        mean: [C].
        var: [C].
        eps: added to `var`.
        needed: which of the three are wanted.
    """
    if not x.numel():  # for which PyTorch's CPU kernel divides by zero, and the process ends
        others = [d for d in range(x.dim()) if d != 1]
        like = var if weight is None else weight
        found = grad * 1, (grad * x).sum(others).to(like.dtype), grad.sum(others).to(like.dtype)
        return tuple(g if wanted else None for g, wanted in zip(found, needed, strict=True))  # type: ignore[return-value]
    if grad.stride() != x.stride():
        grad = grad.new_empty_strided(x.shape, x.stride()).copy_(grad)  # not like x: vmap may have many gradients
    # Statistics of a batch are not used in eval mode, but torch.func.vmap asks for them: any will do.
    found = torch.ops.aten.native_batch_norm_backward.default(
        grad, x, weight, mean, var, mean, var, False, eps, list(needed)
    )
    return tuple(g if wanted else None for g, wanted in zip(found, needed, strict=True))  # type: ignore[return-value]


def quickly_bound(function: _Function) -> _Function:
    """Let `apply` of an autograd function take its arguments as they come.

    PyTorch else reads the signature of `forward` in each call, to fill in defaults, for longer than a small
    convolution takes. For functions with `setup_context` and without defaults.
    """
    function.forward.__signature__ = _ANY_ARGUMENTS  # type: ignore[attr-defined]
    return function


@quickly_bound
class _ConstantScaleBatchNorm(torch.autograd.Function):
    """Eval-mode BN whose scale is not trained: backward keeps the scale, not the activation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        eps: float,
    ) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        bias, scale = inputs[1:3]
        ctx.save_for_backward(scale)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad * scale.view([1, -1] + [1] * (grad.dim() - 2))
        if ctx.needs_input_grad[1]:
            others = [d for d in range(grad.dim()) if d != 1]
            wide = torch.float64 if scale.dtype == torch.float64 else torch.float32
            grad_bias = grad.sum(others, dtype=wide).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, None, None


@quickly_bound
class _LearnableScaleBatchNorm(torch.autograd.Function):
    """Eval-mode BN whose scale is trained: backward is PyTorch's kernel, given the gradient in the strides of `x`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, weight: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
    ) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, weight, running_mean, running_var, ctx.eps = inputs
        ctx.save_for_backward(x, weight, running_mean, running_var)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        needed = ctx.needs_input_grad
        found = eval_backward(grad, x, weight, mean, var, ctx.eps, (needed[0], needed[2], needed[1]))
        return found[0], found[2], found[1], None, None, None


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32, or as it is where its dtype is float32 or wider."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def in_float64(tensor: Tensor) -> Tensor:
    """Return `tensor` in float64; on the CPU where its device has none (mps)."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def between_image_spread(features: Tensor) -> float:
    """Return by how much images differ in their features, relative to the features' size; 0 for a constant.

    The root mean square over channels of the standard deviation over images, divided by that of the features.

    Args:
        features: one row an image, [N, C] with N >= 2.
    """
    wide = at_least_float32(features)
    size = wide.square().mean().sqrt().clamp_min(torch.finfo(wide.dtype).tiny)
    return float(wide.std(0, correction=0).square().mean().sqrt() / size)
