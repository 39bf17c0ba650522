"""Weight and bias of a convolution or linear map that computes the affine of the BatchNorm (BN) behind it as well.

Per output channel c, with `scale` = gamma / sqrt(var + eps) and `shift` = beta - mean * scale:

    map(x, W, b) * scale + shift  =  map(x, W * scale, b * scale + shift)
"""

from __future__ import annotations

from torch import Tensor

from finetune_bn.functional.frozen import at_least_float32


def merged_weight(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, transposed: bool = False, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the map that computes `map(x, weight, bias) * scale + shift`, in the weight's dtype."""
    shift = shift if bias is None else bias * scale + shift
    return scaled_weight(weight, scale, transposed=transposed, groups=groups), shift.to(weight.dtype)


def scaled_weight(weight: Tensor, scale: Tensor, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """Return the weight of a map whose output channels are multiplied by `scale` [C_out], in the weight's dtype.

    Computed in float32 or higher. The weight of a transposed convolution has its output channels in dim 1, by groups.
    """
    factor = scale.view(-1, *[1] * (weight.dim() - 1))
    if transposed:
        of_groups = scale.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
        factor = of_groups.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))
    return (at_least_float32(weight) * factor).to(weight.dtype)
