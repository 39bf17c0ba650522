"""Read, use and write the statistics of a BatchNorm layer, live or frozen, whatever form it keeps them in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.functional.frozen import at_least_float32, canonicalize, scale_shift, solve_affine
from finetune_bn.functional.moments import accumulator
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.norm_act import behind_norm, has_known_forward


@dataclass(frozen=True)
class Statistics:
    """What a layer normalizes by and scales with in eval mode; copies, in float32 or higher, [C] each.

    Attributes:
        mean: running mean.
        var: running variance, as BatchNorm stores it.
        weight: gamma; None where the layer has none.
        bias: beta; None where the layer has none.
        eps: added to `var`.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def moved_to(self, mean: Tensor, var: Tensor, *, preserve: bool) -> Statistics:
        """Return the same layer with other statistics.

        Args:
            mean: the new running mean.
            var: the new running variance.
            preserve: solve gamma and beta anew, so that the function stays what it is; else they keep their values
                and the function changes.
        """
        mean, var = mean.to(self.mean.dtype), var.to(self.var.dtype)
        if not preserve:
            return replace(self, mean=mean, var=var)
        scale, shift = scale_shift(self.weight, self.bias, self.mean, self.var, self.eps)
        weight, bias = solve_affine(scale, shift, mean, var, self.eps)
        return replace(self, mean=mean, var=var, weight=weight, bias=bias)


def why_no_statistics(layer: nn.Module, *, preserve: bool) -> str | None:
    """Return why the statistics of a layer cannot be measured and replaced, or None where they can.

    Args:
        layer: a BatchNorm layer, live or frozen.
        preserve: whether the layer is to compute the same function afterwards, which needs gamma and beta.
    """
    if isinstance(layer, FrozenBatchNorm):
        if "forward" in vars(layer):
            return "has a forward patched in"
        if not preserve and not layer.has_source_statistics:
            return (
                "is affine='merged' and its statistics from before the conversion are gone (they are not in a "
                "checkpoint): use how='preserve', or recalibrate before converting"
            )
    elif isinstance(layer, _BatchNorm):
        if layer.running_mean is None or layer.running_var is None:
            return "has no running statistics (track_running_stats=False)"
        if not has_known_forward(layer):
            return f"computes something of its own ({type(layer).__module__}.{type(layer).__qualname__})"
    if preserve and (getattr(layer, "weight", None) is None or getattr(layer, "bias", None) is None):
        return "has no gamma and beta that could make up for other statistics: use how='renormalize'"
    return None


def statistics_of(layer: nn.Module) -> Statistics:
    """Return the statistics of a layer for which `why_no_statistics` had no objection.

    For a frozen `merged` layer gamma, beta and the statistics are those of the BatchNorm that it stands for, as far
    as they are known.
    """
    if isinstance(layer, FrozenBatchNorm) and layer.has_source_statistics and layer._source:
        values = layer.values_for(layer._source[0])
    else:
        values = {name: getattr(layer, name) for name in ("running_mean", "running_var", "weight", "bias")}
    mean, var, weight, bias = (
        None if value is None else at_least_float32(value.detach()).clone()
        for value in (values[name] for name in ("running_mean", "running_var", "weight", "bias"))
    )
    assert mean is not None
    assert var is not None
    return Statistics(mean, var, weight, bias, float(layer.eps))  # type: ignore[arg-type]


def normalize(layer: nn.Module, x: Tensor, statistics: Statistics) -> Tensor:
    """Return what the layer would return for `x` [N, C, ...] in eval mode if it had these statistics."""
    wide = accumulator(x)
    tensors = (statistics.mean, statistics.var, statistics.weight, statistics.bias)
    mean, var, weight, bias = (None if t is None else t.to(wide) for t in tensors)
    return behind_norm(layer, F.batch_norm(x, mean, var, weight, bias, False, 0.0, statistics.eps))


def normalize_by_batch(layer: nn.Module, x: Tensor, statistics: Statistics, mean: Tensor, var: Tensor) -> Tensor:
    """Return the layer's output for `x` normalized by its own statistics, and write those to `mean` and `var` [C].

    BatchNorm's kernel for training, which measures what it normalizes by: the moments cost nothing. The variance is
    divided by n - 1, as the kernel stores it, and the one normalized by is not.

    Args:
        layer: the layer.
        x: its input, [N, C, ...].
        statistics: whose gamma and beta it scales with.
        mean: where the mean goes; finite now, of the dtype in which `x` is summed.
        var: where the variance goes, likewise.
    """
    weight, bias = (None if t is None else t.to(mean.dtype) for t in (statistics.weight, statistics.bias))
    return behind_norm(layer, F.batch_norm(x, mean, var, weight, bias, True, 1.0, statistics.eps))


def store(layer: nn.Module, statistics: Statistics, *, preserve: bool) -> None:
    """Write statistics into the layer's own tensors, in place; with `preserve` gamma and beta too.

    A frozen `merged` layer stays canonical: its statistics go to the BatchNorm that it turns back into, and its
    gamma', beta' follow, or stay to the last bit where the function is preserved.
    """
    with torch.no_grad():
        if not isinstance(layer, FrozenBatchNorm) or layer.affine_kind != "merged":
            _fill(layer, statistics, affine=preserve)
            return
        if not layer._source:
            layer._source = (layer.new_batch_norm(),)
        _fill(layer._source[0], statistics, affine=True)
        if not preserve:
            assert statistics.weight is not None
            assert statistics.bias is not None
            values = (statistics.weight, statistics.bias, statistics.mean, statistics.var)
            weight, bias, _, _ = canonicalize(*values, statistics.eps)
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)


def _fill(layer: nn.Module, statistics: Statistics, *, affine: bool) -> None:
    layer.get_buffer("running_mean").copy_(statistics.mean)
    layer.get_buffer("running_var").copy_(statistics.var)
    for name, value in (("weight", statistics.weight), ("bias", statistics.bias)):
        tensor = getattr(layer, name)
        if affine and tensor is not None and value is not None:
            tensor.copy_(value)
