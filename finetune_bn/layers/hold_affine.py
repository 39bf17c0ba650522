"""BatchNorm that goes on normalizing by the batch, with gamma and beta held constant."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_MARK = "_finetune_bn_before"
_CONSTANT = {"weight": 1.0, "bias": 0.0}


def hold_affine(bn: _BatchNorm, *, reset: bool) -> None:
    """Stop training `weight` and `bias` of `bn`; with `reset`, set them to 1 and 0 as well.

    In place, and the layer stays the BatchNorm it is: its statistics are live, so SyncBatchNorm conversion, weight
    averaging and `update_bn` must go on seeing it. What was there before is kept for `release_affine`.
    """
    release_affine(bn)
    before = {}
    for name, constant in _CONSTANT.items():
        parameter = getattr(bn, name)
        if parameter is None:
            continue
        before[name] = (parameter.requires_grad, parameter.detach().clone() if reset else None)
        parameter.requires_grad_(False)
        parameter.grad = None  # with one, and be it zero, an optimizer that holds the parameter moves it
        if reset:
            with torch.no_grad():
                parameter.fill_(constant)
    setattr(bn, _MARK, before)


def is_held(module: nn.Module) -> bool:
    """Tell whether `hold_affine` was applied to the module."""
    return hasattr(module, _MARK)


def was_reset(module: nn.Module) -> bool:
    """Tell whether a held layer's weight and bias were set to 1 and 0 when it was held."""
    return any(value is not None for _, value in getattr(module, _MARK, {}).values())


def train_again(bn: _BatchNorm, other: nn.Module) -> None:
    """Give the Parameters of `other`, which stands in for the held `bn`, the `requires_grad` from before."""
    for name, (requires_grad, _) in getattr(bn, _MARK, {}).items():
        if name in other._parameters:
            getattr(other, name).requires_grad_(requires_grad)


def release_affine(bn: _BatchNorm) -> None:
    """Undo `hold_affine`: `requires_grad` and, where they were reset, the values of `weight` and `bias`.

    A tensor that is no longer the constant it was set to (it was trained under another policy, or loaded) keeps the
    values of today.
    """
    for name, (requires_grad, value) in getattr(bn, _MARK, {}).items():
        parameter = getattr(bn, name)
        parameter.requires_grad_(requires_grad)
        if value is not None and not parameter.is_meta and bool((parameter == _CONSTANT[name]).all()):
            with torch.no_grad():
                parameter.copy_(value)
    if is_held(bn):
        delattr(bn, _MARK)


def changes_function(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Tell whether setting gamma to 1 and beta to 0 changes what a layer with these values computes."""
    pairs = ((weight, 1.0), (bias, 0.0))
    return any(p is not None and not p.is_meta and bool((p != constant).any()) for p, constant in pairs)
