"""A frozen BatchNorm (BN) with a trained scale and the activation behind it, in one step that keeps one tensor.

Left to autograd, two are kept: the layer's input x for the gradient of the scale, and what the activation needs. Here,
with xhat = (x - mean) / sqrt(var + eps) and z = weight * xhat + bias:

- ReLU keeps its output y alone, which the next convolution keeps anyway. Where y > 0, xhat = (y - bias) / weight, and
  elsewhere no gradient passes, so the gradient of `weight` is (sum G (y - bias)) / weight, G being that of z.
  Rounding of y and bias is divided by the weight there: `relu_tells_input` is the rule for when that is safe.
- SiLU and Hardswish keep x alone; z is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune_bn.functional.frozen import at_least_float32, eval_backward, in_transform, quickly_bound

# So small an activation is kept beside the other: less than a hundredth of the memory of eight images, and less time.
FEWEST_IN_ONE_STEP = 1 << 17
# By how much the bias may exceed what the weight makes of the input: it multiplies the rounding error of xhat. A number
# of half precision is rounded to three digits, but each of many independently.
_EXCESS = {torch.float64: 1e4, torch.float32: 64.0, torch.bfloat16: 16.0, torch.float16: 16.0}
# Below this weight the output is in the range where numbers of the dtype lose digits.
_SMALLEST = {torch.float64: 1e-100, torch.float32: 1e-20, torch.bfloat16: 1e-20, torch.float16: 2.0**-7}


def _silu_backward(grad: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, z)  # type: ignore[no-any-return]
    sigmoid = torch.sigmoid(z)  # PyTorch's own cannot be differentiated
    return grad * (sigmoid * (1 + z * (1 - sigmoid)))


Backward = Callable[[Tensor, Tensor], Tensor]
RECOMPUTED: dict[str, tuple[Callable[[Tensor], Tensor], Backward]] = {
    "SiLU": (F.silu, _silu_backward),
    "Hardswish": (F.hardswish, torch.ops.aten.hardswish_backward),
}


def relu_tells_input(weight: Tensor, bias: Tensor | None, size: Tensor | None, dtype: torch.dtype) -> bool:
    """Tell whether the input of BN and ReLU can be told from their output, so that it need not be kept.

    It can where no channel has `|bias| > 64 |weight| size` (16 in half precision) or a weight next to zero; a negative
    weight does no harm. Reading this off the parameters makes the CPU wait for a GPU.

    Args:
        weight: [C].
        bias: [C], or None.
        size: how large xhat is, root mean square, [C]; None for 1.
        dtype: of the activations.
    """
    weight = weight.detach()
    of_bias = None if bias is None else bias.detach() / (weight if size is None else weight * size)
    # Norms, as each is one operation. What is NaN is not safe: 0 / 0 of a channel that is always zero.
    if not torch.linalg.vector_norm(weight, -math.inf).item() >= _SMALLEST[dtype]:
        return False
    return of_bias is None or torch.linalg.vector_norm(of_bias, math.inf).item() <= _EXCESS[dtype]


def frozen_batch_norm_relu(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """Return `relu(batch_norm(x))` in eval mode, bit for bit, keeping the output for backward. See `relu_tells_input`.

    Args:
        x: input, [N, C, ...].
        running_mean: [C].
        running_var: [C].
        weight: [C], not zero.
        bias: [C], or None.
        eps: added to `running_var`.
    """
    return _ReLU.apply(x, weight, bias, running_mean, running_var.clone(), eps)  # type: ignore[no-any-return]


def frozen_batch_norm_act(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor | None, eps: float, act: str
) -> Tensor:
    """Return `act(batch_norm(x))` in eval mode, bit for bit, keeping `x` alone for backward.

    Args:
        x: input, [N, C, ...].
        running_mean: [C].
        running_var: [C].
        weight: [C].
        bias: [C], or None.
        eps: added to `running_var`.
        act: a key of `RECOMPUTED`.
    """
    mean, var = running_mean.clone(), running_var.clone()  # may be written to before backward
    return _Recomputed.apply(x, weight, bias, mean, var, eps, act)  # type: ignore[no-any-return]


@quickly_bound
class _ReLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps).relu_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, bias, _, var, ctx.eps = inputs
        ctx.save_for_backward(output, weight, bias, var)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, var = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled() and not in_transform():
            # PyTorch's kernel, for an input y and a mean that is the bias: it sums G (y - bias) / sqrt(var + eps).
            mean = torch.zeros_like(var) if bias is None else bias
            found = eval_backward(grad, y, weight, mean, var, ctx.eps, (of_x, of_weight, of_bias))
            grad_weight = found[1]
            if grad_weight is not None:
                deviation = torch.sqrt(at_least_float32(var) + ctx.eps)
                grad_weight = (grad_weight * deviation / weight).to(weight.dtype)
            return found[0], grad_weight, found[2], None, None, None
        of_deviation = torch.rsqrt(at_least_float32(var) + ctx.eps)
        per_channel = [1, -1] + [1] * (grad.dim() - 2)
        others = [d for d in range(grad.dim()) if d != 1]
        sums = grad.sum(others, dtype=of_deviation.dtype)
        grad_x = grad_weight = grad_bias = None
        if of_x:
            grad_x = grad * (weight * of_deviation).to(grad.dtype).view(per_channel)
        if of_weight:
            # Not sum(G y) - bias sum(G): where the bias is large the two cancel.
            of_input = at_least_float32(y) if bias is None else y - at_least_float32(bias).view(per_channel)
            grad_weight = ((of_input * grad).sum(others) / weight).to(weight.dtype)
        if of_bias:
            grad_bias = sums.to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


@quickly_bound
class _Recomputed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, act: str
    ) -> Tensor:
        return RECOMPUTED[act][0](F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.eps, ctx.act = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var = ctx.saved_tensors
        z = F.batch_norm(x, mean, var, weight, bias, False, 0.0, ctx.eps)
        grad = RECOMPUTED[ctx.act][1](grad, z)
        return *eval_backward(grad, x, weight, mean, var, ctx.eps, ctx.needs_input_grad[:3]), *[None] * 4
