"""What an optimizer needs to know of a network: which parameters learn how fast, and when."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.frozen import FrozenBatchNorm

Schedule = Literal["cosine", "constant"]
SCHEDULES: tuple[Schedule, ...] = ("cosine", "constant")


def lr_factor(step: int, total: int, warmup: int, schedule: Schedule) -> float:
    """Return the share of the full learning rate at an optimizer step.

    Linear over the first `warmup` steps, without a step at 0, so that step `warmup` is the first at the full rate;
    then half a cosine that would be 0 at step `total`, one behind the last, or no change.

    Args:
        step: number of optimizer steps made so far.
        total: number of optimizer steps of the whole training.
        warmup: number of steps before the full rate.
        schedule: `cosine` or `constant`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return (1 + math.cos(math.pi * progress)) / 2


def parameter_groups(
    net: nn.Module, lr: float, weight_decay: float, head_lr_factor: float = 1.0, affine_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Return what `net` trains as parameter groups for an optimizer, each parameter in one of them.

    Up to six groups: `backbone`, `head` and `affine`, each with and without weight decay; a group that would be empty
    is left out. `affine` is what belongs to a norm layer, wherever that is; `head` is the rest of timm's
    `get_classifier()`. Not decayed are the parameters of norm layers, biases and all else with one dimension or none,
    and those that timm's `no_weight_decay()` names. Each group has `params, lr, weight_decay, name`.

    Args:
        net: a timm model, or any module; one without `get_classifier` has no head.
        lr: learning rate of the backbone.
        weight_decay: weight decay of what is decayed.
        head_lr_factor: learning rate of the head, as a multiple of `lr`.
        affine_lr_factor: learning rate of the norm layers, as a multiple of `lr`.

    Raises:
        FinetuneBNError: nothing is trained, or `head_lr_factor` is given for a net that has no head.
    """
    head = {id(p) for module in _classifiers(net) for p in module.parameters()}
    if not head and head_lr_factor != 1:
        allowed = f"1 for a {type(net).__name__}, which has no classifier that timm's get_classifier() would name"
        raise FinetuneBNError(complaint("head_lr_factor", head_lr_factor, allowed))
    affine = {id(p) for module in net.modules() if is_norm(module) for p in module.parameters(recurse=False)}
    undecayed: Iterable[str] = getattr(net, "no_weight_decay", tuple)()
    factors = {"backbone": 1.0, "head": head_lr_factor, "affine": affine_lr_factor}
    names: dict[int, list[str]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)

    groups: dict[str, dict[str, Any]] = {}
    for parameter in net.parameters():
        if not parameter.requires_grad:
            continue
        key = id(parameter)
        part = "affine" if key in affine else "head" if key in head else "backbone"
        spared = key in affine or parameter.ndim <= 1 or any(fnmatch(n, p) for n in names[key] for p in undecayed)
        group = groups.setdefault(
            f"{part}/{'no_decay' if spared else 'decay'}",
            {"params": [], "lr": lr * factors[part], "weight_decay": 0.0 if spared else weight_decay},
        )
        group["params"].append(parameter)
    if not groups:
        raise FinetuneBNError(complaint("net", type(net).__name__, "a network with parameters that require gradients"))
    return [{**groups[name], "name": name} for name in sorted(groups)]


def _classifiers(net: nn.Module) -> Sequence[nn.Module]:
    """Return the head's layers: timm's distilled networks have two."""
    found = net.get_classifier() if callable(getattr(net, "get_classifier", None)) else ()  # type: ignore[operator]
    return found if isinstance(found, (tuple, list)) else (found,)


def is_norm(module: nn.Module) -> bool:
    """Tell whether a layer is a norm layer; timm has many of its own, and calls them so."""
    if isinstance(module, (FrozenBatchNorm, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return True
    own = list(module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and all(p.ndim <= 1 for p in own)
