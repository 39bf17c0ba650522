"""BN with fixed statistics in an eager training step: the numbers of `frozen_batch_norm` with less work on the host.

With small batches a GPU waits for Python and for launches. So what backward needs of constants is made once, and an
autograd function is called without what only a compiler, a tracer or a transform of `torch.func` needs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune_bn.functional.frozen import at_least_float32, frozen_batch_norm, scale_of


class Known(NamedTuple):
    """Copies of fixed statistics, and what follows from them.

    Attributes:
        mean: copy of the mean, [C].
        var: copy of the variance, [C].
        zero: a mean of 0, [C].
        offset: -mean / sqrt(var + eps), [C], float32 or higher; None where it is 0.
    """

    mean: Tensor
    var: Tensor
    zero: Tensor
    offset: Tensor | None


class Constants:
    """What is fixed in a layer, with what backward needs of it: made once, and anew where a tensor was written to.

    Backward works with copies, so that a write to the buffers between forward and backward (DDP broadcasts them) does
    not invalidate it. "Written to" is what autograd's version counters tell: `load_state_dict`, a recalibration, an
    average that copies into the tensors of a state dict; also a tensor put in place of another, by `.to()` or by hand.
    Writes that they do not count (through `tensor.data` or numpy) are seen on the CPU, where the numbers are compared;
    on a GPU that would be to wait for it.
    Several threads may ask, with tensors of their own (the replicas of `nn.DataParallel`).
    """

    def __init__(self) -> None:
        self._statistics: tuple[_Seen, Known] | None = None
        self._of_scale: tuple[_Seen, dict[tuple[torch.dtype, int], Tensor]] | None = None

    def of(self, mean: Tensor, var: Tensor, eps: float) -> Known:
        """Return what is known of these statistics."""
        found = self._statistics
        if found is None or not found[0].are(eps, mean, var):
            seen = _Seen(eps, mean, var)
            with torch.no_grad():
                centered = not mean.is_meta and not mean.any()
                offset = None if centered else -at_least_float32(mean) * scale_of(None, var, eps)
                found = self._statistics = seen, Known(mean.clone(), var.clone(), torch.zeros_like(mean), offset)
        return found[1]

    def scale(self, weight: Tensor | None, var: Tensor, eps: float, dtype: torch.dtype, dims: int) -> Tensor:
        """Return the scale of a layer whose weight is not trained, [C, 1, ...] to multiply [N, C, ...] with."""
        known = self._of_scale
        if known is None or not known[0].are(eps, var, weight):
            known = self._of_scale = _Seen(eps, var, weight), {}
        found = known[1].get((dtype, dims))
        if found is None:
            with torch.no_grad():
                found = scale_of(weight, var, eps).to(dtype).view(-1, *[1] * (dims - 2))
            known[1][dtype, dims] = found
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Constants:
        return Constants()  # the copy's tensors are others

    def __reduce__(self) -> tuple[type[Constants], tuple[()]]:
        return Constants, ()


class _Seen:
    """Two tensors, as they are now."""

    __slots__ = ("_eps", "_one", "_two")

    def __init__(self, eps: float, one: Tensor, two: Tensor | None) -> None:
        self._eps = eps
        self._one, self._two = _state_of(one), None if two is None else _state_of(two)

    def are(self, eps: float, one: Tensor, two: Tensor | None) -> bool:
        """Tell whether these are the two, and nobody has written to them."""
        # Asked by each layer in each step: one call, in which the same is written down twice.
        tensor, version, place, size, memory, numbers = self._one
        if one is not tensor or eps != self._eps or one._version != version or one.data_ptr() != place:
            return False
        if one.nbytes != size or (memory is not None and memory.raw != numbers):
            return False
        if two is None or self._two is None:
            return two is None and self._two is None
        tensor, version, place, size, memory, numbers = self._two
        if two is not tensor or two._version != version or two.data_ptr() != place or two.nbytes != size:
            return False
        return memory is None or memory.raw == numbers


def _state_of(tensor: Tensor) -> tuple[Tensor | None, int, int, int, ctypes.Array[ctypes.c_char] | None, bytes]:
    """Return a tensor and its numbers: itself, its version, where it lies, its size, a view of the memory, a copy."""
    place, size = tensor.data_ptr(), tensor.nbytes
    if tensor.is_inference():
        return None, 0, place, size, None, b""  # writes to it are not counted: its state is never that of before
    if not (tensor.is_cpu and tensor.is_contiguous() and size):
        return tensor, tensor._version, place, size, None, b""
    # Not compared by torch.equal: what is launched in a step stays what it is without. A view of the memory is made
    # once, as that takes longer than to read it, and is read only while the tensor still lies there.
    memory = (ctypes.c_char * size).from_address(place)
    return tensor, tensor._version, place, size, memory, memory.raw


def plain_step() -> bool:
    """Tell whether this is a step of eager reverse-mode autograd: no compiler, tracer, transform or forward mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # make_fx
        or torch.autograd.forward_ad._current_level >= 0
    )


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return `function.apply` without what transforms of `torch.func` need; for use in a `plain_step`.

    Its backward pass is called directly as well, where PyTorch asks each time anew by which name it goes.
    """
    function._backward_cls.apply = function.backward  # type: ignore[attr-defined]
    return super(torch.autograd.Function, function).apply  # type: ignore[no-any-return, misc]


def batch_norm_in_step(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    constants: Constants,
) -> Tensor:
    """Return `frozen_batch_norm` of the same tensors for a layer that has `constants` of its own."""
    if not torch.is_grad_enabled() or not plain_step() or running_var.is_inference():
        return frozen_batch_norm(x, running_mean, running_var, weight, bias, eps)
    cudnn = torch._C._get_cudnn_enabled()  # torch.backends.cudnn.enabled, which costs as much as a launch
    if weight is not None and weight.requires_grad:
        # PyTorch's own backward, but for one image, whose gradient may come in strides that its CPU kernel gets wrong.
        if len(x) < 2 and not x.is_cuda:
            return frozen_batch_norm(x, running_mean, running_var, weight, bias, eps)
        known = constants.of(running_mean, running_var, eps)
        return torch.batch_norm(x, weight, bias, known.mean, known.var, False, 0.0, eps, cudnn)
    if bias is not None and bias.requires_grad:
        scale = constants.scale(weight, running_var, eps, x.dtype, x.dim())
        return _apply_shift(x, bias, (scale, running_mean, running_var, weight, eps, cudnn))  # type: ignore[no-any-return]
    if not x.requires_grad:
        return torch.batch_norm(x, weight, bias, running_mean, running_var, False, 0.0, eps, cudnn)
    scale = constants.scale(weight, running_var, eps, x.dtype, x.dim())
    return _apply_constant(x, (scale, running_mean, running_var, weight, bias, eps, cudnn))  # type: ignore[no-any-return]


class _Constant(torch.autograd.Function):
    """Eval-mode BN of which nothing is trained: backward keeps the scale and no activation.

    What is constant comes as one argument: each one of its own is looked at by autograd, in both passes. Nor is the
    scale put away as a saved tensor: the layer has it in any case, and nobody writes to it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, constants: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float, bool]
    ) -> Tensor:
        ctx.scale, mean, var, weight, bias, eps, cudnn = constants
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, cudnn)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


class _ConstantScale(torch.autograd.Function):
    """Eval-mode BN whose shift is trained and whose scale is not, as `_Constant`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor, constants: tuple[Tensor, Tensor, Tensor, Tensor | None, float, bool]
    ) -> Tensor:
        ctx.scale, mean, var, weight, eps, cudnn = constants
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, cudnn)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        of_bias = grad.sum([d for d in range(grad.dim()) if d != 1], dtype=wide)  # autograd casts it to bias's dtype
        return grad * ctx.scale if ctx.needs_input_grad[0] else None, of_bias, None


_apply_constant, _apply_shift = direct_apply(_Constant), direct_apply(_ConstantScale)
