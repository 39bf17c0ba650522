"""A frozen BatchNorm (BN) with a trained scale that shares its backward pass with the convolution in front.

Left to autograd, the layer keeps its input y for the gradient of its scale: as much memory as BN in training. But with

    y = conv(x, W) + b,    z = scale y + shift,    scale = gamma / sqrt(var + eps),    shift = beta - mean scale,

z is also conv(x, scale W) + (scale b + shift), and so is its gradient (Tune mode: You et al., ICLR 2024, section 3). Of
a gradient G of z, one convolution backward with the weight scale W gives the gradient of x, H (that of scale W) and
sum G, and of these follow

    grad W = scale H,    grad gamma = (sum(W H) + (b - mean) sum G) / sqrt(var + eps),    grad beta = sum G,

with x, which the convolution keeps anyway, and without y. What is made of W and H is BN in eval mode with mean 0, its
forward and its backward pass: one kernel each.

Both forward tensors are what they are without this. Who holds y, looks at it or asks for its gradient gets it: where y
is still there when backward comes, backward goes through y; where y is gone and has hooks, or its node has, y is
computed again. So nothing has to be known of the modules: the graph that autograd recorded tells, in each step anew,
whether a convolution made y and nothing changed it.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from finetune_bn.functional.eager_step import Constants, Known, direct_apply, plain_step
from finetune_bn.functional.frozen import at_least_float32, eval_backward

FoldMode = Literal["auto", "always", "never"]
FOLD_MODES: tuple[FoldMode, ...] = get_args(FoldMode)
# Sharing costs time in proportion to the weight, and some more whatever its size; keeping y costs memory, and time, in
# proportion to y. A small y is kept: by the second number all that is kept stays within an eighth of the weights.
_FEWEST, _OF_WEIGHT = 1 << 18, 1 / 8
# Autocast's copy of so small a weight is kept: to make it again is a launch.
_SMALL = 1 << 16
_convolution_backward = torch.ops.aten.convolution_backward.default
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
_OTHERS = {3: (0, 2), 4: (0, 2, 3), 5: (0, 2, 3, 4)}  # all dimensions but the channels'


def pays(size: int, weights: int) -> bool:
    """Tell whether sharing is worth its while for `size` elements of y, and so many of the convolution's weight."""
    return size >= _FEWEST and size >= _OF_WEIGHT * weights


def fewest(size: float, weights: int) -> int:
    """Return from how many images on sharing is worth its while, of which each has `size` elements of y."""
    return max(1, math.ceil(max(_FEWEST, _OF_WEIGHT * weights) / max(size, 1)))


Hooks = tuple[Mapping[int, Any], ...]
_Pack = TypeVar("_Pack", bound=Callable[..., Any])
_COUNTS = "_counts_what_is_kept"


def only_counts(pack: _Pack) -> _Pack:
    """Mark the first of two saved-tensor hooks as one that lets each tensor be read as often as wanted.

    Under others (`torch.autograd.graph.saved_tensors_hooks`) no backward pass is shared.
    """
    setattr(pack, _COUNTS, True)
    return pack


class Convolution(NamedTuple):
    """A convolution as autograd recorded it.

    Attributes:
        x: its input.
        weight: its weight: the Parameter, also where autocast made a copy of it.
        dtype: the dtype that it computed in.
        bias: its bias, or None.
        geometry: stride, padding, dilation, transposed, output_padding, groups.
        node: its node in the graph.
        hooks: those of its result and of the node; none as yet.
        watched: whether what is kept for backward is being counted, see `only_counts`.
    """

    x: Tensor
    weight: Tensor
    dtype: torch.dtype
    bias: Tensor | None
    geometry: tuple[Any, ...]
    node: Any
    hooks: Hooks
    watched: bool


def producer_of(y: Tensor, weight: Tensor | None, mode: FoldMode) -> Convolution | None:
    """Return the convolution with which a BN of this input and scale shares its backward pass; None where it does not.

    Args:
        y: input of the BN, [N, C, ...].
        weight: gamma, [C], or None.
        mode: "auto" shares where that pays, "always" where it can, "never" never.
    """
    if mode == "never" or type(y) is not Tensor or weight is None or not weight.requires_grad:
        return None
    if not torch.is_grad_enabled() or y.dim() < 3 or not plain_step():
        return None  # a compiler weighs for itself what to keep and what to compute again
    node: Any = y.grad_fn
    if type(node).__name__ != "ConvolutionBackward0" or y._version or y._backward_hooks or y.retains_grad:
        return None  # made by something else, written to since, or its gradient is asked for already
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and not getattr(hooks[0], _COUNTS, False):
        return None  # a checkpoint would compute again, and a tensor that was put away would be fetched
    if node._saved_transposed:
        return None
    try:
        x, kernel = node._saved_input, node._saved_weight
    except RuntimeError:
        return None  # written to since: a backward pass will say so, and there may be none
    if mode == "auto" and not pays(y.numel(), kernel.numel()):
        return None
    bias = None
    if node._saved_bias_sym_sizes_opt != (0,):
        bias = _leaf(node.next_functions[2][0])
        if bias is None:
            return None  # there is one, and where it is cannot be told
    dtype = kernel.dtype
    if kernel.numel() > _SMALL and type(kernel.grad_fn).__name__ == "ToCopyBackward0":
        leaf = _leaf(kernel.grad_fn)  # autocast made a copy: the Parameter needs no memory of its own
        kernel = kernel if leaf is None else leaf
    if _row_order(kernel) is None or weight.dtype not in (kernel.dtype, torch.float32):
        return None  # in backward a kernel takes both, and takes them so alone
    hooks_of_y = _hooks_of(y, node)
    if _any(hooks_of_y):
        return None
    where = (node._saved_stride, node._saved_padding, node._saved_dilation)
    geometry = (*where, False, node._saved_output_padding, node._saved_groups)
    return Convolution(x, kernel, dtype, bias, geometry, node, hooks_of_y, hooks is not None)


def shared_batch_norm(
    y: Tensor,
    producer: Convolution,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    constants: Constants,
) -> Tensor:
    """Return BN in eval mode of `y`, bit for bit; its backward pass is the producer's as well.

    Args:
        y: what the producer returned, [N, C, ...].
        producer: what `producer_of` found.
        running_mean: [C].
        running_var: [C].
        weight: gamma, [C].
        bias: beta, [C], or None.
        eps: added to the variance.
        constants: the layer's own.
    """
    if producer.watched:
        y = y.detach()  # the convolution's own node is not reached: what was kept is asked for once, as ever
    elif producer.weight.dtype != producer.dtype:
        _Recast(producer.weight, producer.dtype, producer.node)
    known = constants.of(running_mean, running_var, eps)
    return _apply_shared(y, producer.x, producer.weight, producer.bias, weight, bias, (known, eps, producer))  # type: ignore[no-any-return]


def _hooks_of(y: Tensor, node: Any) -> Hooks:
    """Return the hooks of a tensor and of the node that made it, those too that are put there later.

    Registering one is the way to those of a node; of the tensor it is done as `register_hook` does it, without the one.
    Where they are outlives the tensor.
    """
    if y._backward_hooks is None:
        y._backward_hooks = OrderedDict()
        node._register_hook_dict(y)
    after, before = node.register_hook(_nothing), node.register_prehook(_nothing)
    found = after.hooks_dict_ref(), before.hooks_dict_ref()
    del found[0][after.id], found[1][before.id]
    return y._backward_hooks, *found


def _any(hooks: Hooks) -> bool:
    return any(getattr(hook, "__func__", None) is not _Recast.look for some in hooks for hook in some.values())


def _nothing(*arguments: Any) -> None:
    pass


_WRITTEN = "one of the variables needed for gradient computation has been modified by an inplace operation: {}"


_LATE_HOOKS = (
    "the output of a convolution in front of a frozen BatchNorm layer got a hook behind that layer, and backward was "
    "called with create_graph=True: the hook would not see the second derivatives. Put it there before the layer runs, "
    "or keep the tensor, or convert with fold='never'"
)


class _Recast:
    """Lets the convolution's own node keep the Parameter in place of autocast's copy of it.

    That node is reached in each backward pass, and mostly with no gradient: then no copy is made again.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, node: Any) -> None:
        self.weight, self.dtype, self.needed, self.version = weight.detach(), dtype, True, weight._version
        try:
            node._raw_saved_weight.register_hooks(self.pack, self.unpack)
        except RuntimeError:
            return  # another layer on the same result did it already
        node.register_prehook(self.look)

    def pack(self, copy: Tensor) -> Tensor:
        return self.weight

    def unpack(self, weight: Tensor) -> Tensor:
        if self.needed and weight._version != self.version:
            raise RuntimeError(_WRITTEN.format("the weight of a convolution in front of a frozen BatchNorm layer"))
        return weight.to(self.dtype) if self.needed else weight

    def look(self, gradients: tuple[Tensor | None, ...]) -> None:
        self.needed = gradients[0] is not None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        kernel: Tensor,
        conv_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        constants: tuple[Known, float, Convolution],
    ) -> Tensor:
        ctx.save_for_backward(x, kernel, conv_bias, weight)
        known, eps, producer = constants
        ctx.y = weakref.ref(y)
        # Nothing that holds x: what is saved is let go after backward, and this is not.
        ctx.constants = known, eps, producer.geometry, producer.dtype, producer.hooks
        cudnn = torch._C._get_cudnn_enabled()
        return torch.batch_norm(y, weight, bias, known.mean, known.var, False, 0.0, eps, cudnn)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel, conv_bias, weight = ctx.saved_tensors
        (mean, var, zero, offset), eps, geometry, dtype, hooks = ctx.constants
        need_y, need_x, need_kernel, need_conv_bias, need_weight, need_bias, _ = ctx.needs_input_grad
        y = ctx.y()
        if y is not None and need_y:  # somebody holds it, and may ask for its gradient
            if y._version:
                what = "the output of a convolution, which is the input of a frozen BatchNorm layer"
                raise RuntimeError(_WRITTEN.format(what))
        elif need_y and _any(hooks):
            if torch.is_grad_enabled():
                raise RuntimeError(_LATE_HOOKS)
            of_dtype = kernel.to(dtype), None if conv_bias is None else conv_bias.to(dtype)
            y = torch.ops.aten.convolution.default(x, *of_dtype, *geometry)
        if y is not None and need_y:
            found = eval_backward(grad, y, weight, mean, var, eps, (need_y, need_weight, need_bias))
            return found[0], None, None, None, found[1], found[2], None
        compute = _differentiable if torch.is_grad_enabled() else _by_kernels
        of_x, of_kernel, of_weight, total = compute(grad, x, kernel, weight, zero, var, eps, geometry, dtype, need_x)
        if conv_bias is not None:
            rsigma = torch.rsqrt(at_least_float32(var) + eps)
            offset = (at_least_float32(conv_bias) - at_least_float32(mean)) * rsigma
        if offset is not None:
            of_weight = torch.addcmul(
                of_weight, offset, total if total.dtype == of_weight.dtype else total.to(of_weight.dtype)
            )
        # Autograd casts the gradients of weight and bias to their dtypes.
        return (
            None,
            of_x,
            of_kernel if need_kernel else None,
            (at_least_float32(weight) * rsigma * total).to(conv_bias.dtype) if need_conv_bias else None,
            of_weight,
            total if need_bias else None,
            None,
        )


_apply_shared = direct_apply(_Shared)


def _by_kernels(
    grad: Tensor,
    x: Tensor,
    kernel: Tensor,
    weight: Tensor,
    zero: Tensor,
    var: Tensor,
    eps: float,
    geometry: tuple[Any, ...],
    dtype: torch.dtype,
    need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Return the gradients of x and W, sum(W H) / sqrt(var + eps) and sum G."""
    order = _row_order(kernel)
    assert order is not None
    rows = _rows(kernel, order)
    scaled = torch.batch_norm(rows, weight, None, zero, var, False, 0.0, eps, torch._C._get_cudnn_enabled())
    scaled = _as_kernel(scaled, kernel, order)
    scaled = scaled if scaled.dtype == dtype else scaled.to(dtype)
    of_x, of_scaled, _ = _convolution_backward(grad, x, scaled, None, *geometry, [need_x, True, False])
    # The convolution's own sum of the gradient, that of its bias, is less exact on a CPU, and in half precision.
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    total = grad.sum(_OTHERS[grad.dim()], dtype=wide)
    of_scaled = _rows(of_scaled if of_scaled.dtype == kernel.dtype else of_scaled.to(kernel.dtype), order)
    of_rows, of_weight, _ = _batch_norm_backward(
        of_scaled, rows, weight, zero, var, zero, var, False, eps, [True, True, False]
    )
    return of_x, _as_kernel(of_rows, kernel, order), of_weight, total


def _differentiable(
    grad: Tensor,
    x: Tensor,
    kernel: Tensor,
    weight: Tensor,
    zero: Tensor,
    var: Tensor,
    eps: float,
    geometry: tuple[Any, ...],
    dtype: torch.dtype,
    need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Return what `_by_kernels` returns, by operations that autograd can go through again."""
    rsigma = torch.rsqrt(at_least_float32(var) + eps)
    per_row = [-1] + [1] * (kernel.dim() - 1)
    scale = (at_least_float32(weight) * rsigma).view(per_row)
    of_x, of_scaled, _ = _convolution_backward(
        grad, x, (kernel * scale).to(dtype), None, *geometry, [need_x, True, False]
    )
    of_scaled = at_least_float32(of_scaled)
    return (
        of_x,
        (of_scaled * scale).to(kernel.dtype),
        (of_scaled * kernel).flatten(1).sum(1) * rsigma,
        grad.sum(_OTHERS[grad.dim()], dtype=rsigma.dtype),
    )


def _row_order(kernel: Tensor) -> torch.memory_format | None:
    """Return the memory format of a weight whose channels lie one behind the other; None where they do not."""
    if kernel.is_contiguous():
        return torch.contiguous_format
    if kernel.dim() in (4, 5):
        order = torch.channels_last if kernel.dim() == 4 else torch.channels_last_3d
        if kernel.is_contiguous(memory_format=order):
            return order
    return None


def _rows(kernel: Tensor, order: torch.memory_format) -> Tensor:
    """Return a weight as [1, C, elements of a channel], in the order in which they lie in memory."""
    kernel = kernel.contiguous(memory_format=order)
    if order is not torch.contiguous_format:
        kernel = kernel.movedim(1, -1)
    return kernel.view(1, kernel.shape[0], -1)


def _as_kernel(rows: Tensor, kernel: Tensor, order: torch.memory_format) -> Tensor:
    """Return rows as a weight of the shape and strides of `kernel`."""
    return rows.view_as(kernel) if order is torch.contiguous_format else rows.as_strided(kernel.shape, kernel.stride())


def _leaf(node: Any) -> Tensor | None:
    """Return the leaf that a node of the graph leads to, through one change of dtype; None for anything else."""
    if type(node).__name__ == "ToCopyBackward0":
        node = node.next_functions[0][0]
    return node.variable if type(node).__name__ == "AccumulateGrad" else None
