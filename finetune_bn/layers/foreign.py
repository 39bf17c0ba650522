"""Frozen BatchNorm layers of other packages: told by their structure, and brought back to life as a BatchNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.norm_act import new_norm_act
from finetune_bn.layers.stand_in import share_hooks

_MARK = "_finetune_bn_foreign"
_FOUR = ("weight", "bias", "running_mean", "running_var")
_USUAL_EPS = (1e-5, 0.0, 1e-3)  # of layers that keep theirs in the code of `forward`: transformers', maskrcnn's
_SAME = 1e-5


def is_foreign_frozen(module: nn.Module) -> bool:
    """Tell whether the module is a frozen BatchNorm of another package.

    Those of torchvision, timm, detectron2 and transformers have in common: weight, bias, running_mean and running_var
    are buffers of one number a channel, nothing is trained, and at most a drop layer and an activation come behind.
    """
    if isinstance(module, (_BatchNorm, FrozenBatchNorm, torch.jit.ScriptModule)) or module._parameters:
        return False
    tensors = [module._buffers.get(name) for name in _FOUR]
    if any(t is None or t.dim() != 1 or t.shape != tensors[0].shape for t in tensors):  # type: ignore[union-attr]
        return False
    return module._buffers.keys() <= {*_FOUR, "num_batches_tracked"} and module._modules.keys() <= {"drop", "act"}


def revived(layer: nn.Module) -> _BatchNorm:
    """Return a BatchNorm of the same eval-mode function, with tensors of its own; `layer` is kept for `laid_to_rest`.

    timm's layer with an activation becomes timm's `BatchNormAct2d`, all others `BatchNorm2d`. Ask `why_not_revived`.
    """
    mean = layer.get_buffer("running_mean")
    eps = _eps(layer)
    assert eps is not None
    if layer._modules:
        bn = new_norm_act(type(layer).__name__, mean, eps, 0.1)
        for name, part in layer._modules.items():
            setattr(bn, name, part)
    else:
        bn = nn.BatchNorm2d(mean.numel(), eps, device=mean.device, dtype=mean.dtype)
    with torch.no_grad():
        for name in _FOUR:
            getattr(bn, name).copy_(layer.get_buffer(name))
    bn.training = layer.training
    share_hooks(layer, bn)
    setattr(bn, _MARK, (layer,))  # in a tuple, so that it is no part of the module tree
    return bn


def laid_to_rest(bn: _BatchNorm) -> nn.Module:
    """Return the foreign layer that `bn` was revived from, with today's values."""
    (layer,) = getattr(bn, _MARK)
    with torch.no_grad():
        for name in _FOUR:
            value, there = getattr(bn, name).detach(), layer.get_buffer(name)
            if value.device == there.device and value.dtype == there.dtype:
                there.copy_(value)
            else:
                layer._buffers[name] = value.clone()
    layer.training = bn.training
    share_hooks(bn, layer)
    return layer  # type: ignore[no-any-return]


def foreign_layer(bn: nn.Module) -> nn.Module | None:
    """Return the foreign layer that a BatchNorm, or the BatchNorm in a converted layer, was revived from."""
    source = getattr(bn, "_source", ())
    layer: tuple[nn.Module, ...] = getattr(source[0] if source else bn, _MARK, ())
    return layer[0] if layer else None


def why_not_revived(layer: nn.Module) -> str | None:
    """Return why no BatchNorm stands for a foreign frozen layer, or None where one can."""
    if _eps(layer) is None:
        return (
            f"its forward ({type(layer).__module__}.{type(layer).__qualname__}) is not that of a BatchNorm in eval mode"
        )
    return None


def _eps(layer: nn.Module) -> float | None:
    """Return the eps with which the layer computes; None where it computes something else."""
    own = getattr(layer, "eps", None)
    tensors: list[Tensor] = [layer.get_buffer(name) for name in _FOUR]
    if tensors[0].is_meta or layer._modules:  # an activation hides it; the proof of a conversion looks again
        return float(own) if own is not None else _USUAL_EPS[0]
    weight, bias, mean, var = tensors
    reach = 2 * (var + _USUAL_EPS[0]).sqrt()
    x = torch.stack([mean - reach, mean + reach]).view(2, -1, 1, 1)
    with torch.no_grad():
        try:
            y = layer.forward(x.clone())
            tried = [float(own)] if own is not None else _USUAL_EPS
            off = {eps: _distance(y, F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)) for eps in tried}
        except Exception:  # it takes another input, or has a forward of another kind
            return None
    best = min(off, key=lambda eps: off[eps])
    return best if off[best] <= _SAME or weight.dtype in (torch.float16, torch.bfloat16) else None


def _distance(y: Tensor, reference: Tensor) -> float:
    if y.shape != reference.shape:
        return float("inf")
    return float((y - reference).abs().max() / reference.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
