"""Find the BatchNorm layers of a model, all their names and the timm stages they lie in."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.foreign import is_foreign_frozen
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.group_norm import GroupNorm
from finetune_bn.utilities.probe import Probe


@dataclass(frozen=True)
class BatchNormSite:
    """A BatchNorm layer of a model, live or frozen.

    Attributes:
        names: all names under which the model holds it; "" is the root. More than one where it is shared.
        kind: class name.
        num_features: number of channels C.
        module: the layer.
    """

    names: tuple[str, ...]
    kind: str
    num_features: int
    module: nn.Module = field(repr=False, compare=False)


def is_batch_norm(module: nn.Module) -> bool:
    """Tell whether a module is a BatchNorm, live or frozen, or a GroupNorm that was converted from one."""
    return isinstance(module, (_BatchNorm, FrozenBatchNorm)) or is_converted_group_norm(module)


def is_converted_group_norm(module: nn.Module) -> bool:
    """Tell whether a module is a GroupNorm that was converted from a BatchNorm."""
    return isinstance(module, GroupNorm) and module.source is not None


def find_batch_norms(model: nn.Module, *, group_norms: bool = False) -> list[BatchNormSite]:
    """Return the BatchNorm layers of `model`, live and frozen, in the order of definition.

    Args:
        model: any module.
        group_norms: also those that were converted to GroupNorm, which have no statistics.
    """
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_batch_norm(module) and (group_norms or not isinstance(module, GroupNorm)):
            modules[id(module)] = module
            names.setdefault(id(module), []).append(name)
    return [
        BatchNormSite(tuple(names[key]), type(module).__name__, int(module.num_features), module)  # type: ignore[arg-type]
        for key, module in modules.items()
    ]


def find_foreign(model: nn.Module) -> list[BatchNormSite]:
    """Return frozen BatchNorm layers of other packages (`foreign.is_foreign_frozen`), in the order of definition."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_foreign_frozen(module):
            modules[id(module)] = module
            names.setdefault(id(module), []).append(name)
    return [
        BatchNormSite(tuple(names[key]), type(module).__name__, module.get_buffer("weight").numel(), module)
        for key, module in modules.items()
    ]


def find_lookalikes(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return layers that keep running statistics, or call themselves BatchNorm, and are none that we know."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, (_BatchNorm, FrozenBatchNorm)):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            if "BatchNorm" in _scripted_kind(module):
                found.append((name, module))
            continue
        has_statistics = any(module._buffers.get(key) is not None for key in ("running_mean", "running_var"))
        if has_statistics or (is_leaf(module) and "BatchNorm" in type(module).__name__):
            found.append((name, module))
    return found


def why_left_alone(lookalike: nn.Module) -> str:
    """Return what a layer of `find_lookalikes` is, so that it is left alone."""
    if isinstance(lookalike, torch.jit.ScriptModule):
        return f"is a {_scripted_kind(lookalike)} within a ScriptModule, where no layer can be replaced"
    kind = f"{type(lookalike).__module__}.{type(lookalike).__name__}"
    if is_foreign_frozen(lookalike):
        return (
            f"is frozen already, a {kind}; to convert it, name its class in a rule: "
            f"Rule(type={type(lookalike).__name__!r}, policy=...)"
        )
    if type(lookalike) is nn.Module:  # what torch.fx makes of a layer whose forward it has traced
        return (
            "is no layer any more, but holds the tensors of one for a traced graph, which moves them in training: "
            "convert first, trace then"
        )
    return f"is no torch BatchNorm ({kind})"


def _scripted_kind(module: torch.jit.ScriptModule) -> str:
    return str(getattr(module, "original_name", type(module).__name__))


def positions_at(model: nn.Module, sites: Sequence[BatchNormSite], probes: Sequence[Probe]) -> dict[str, int]:
    """Return how many values a channel has in an image at each site, the fewest of its calls.

    Keyed by the site's first name; a site that no probe reaches is not in it, nor is any where a guessed probe fails.
    """
    found: dict[str, int] = {}
    names = {id(site.module): site.names[0] for site in sites}

    def arrive(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and torch.is_tensor(args[0]) and args[0].dim() > 1:
            name = names[id(module)]
            found[name] = min(args[0][0, 0].numel(), found.get(name, args[0].numel()))

    handles = [site.module.register_forward_pre_hook(arrive) for site in sites]
    try:
        for probe in probes:
            with contextlib.nullcontext() if probe.given else contextlib.suppress(FinetuneBNError):
                probe.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


def timm_stages(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """Return the stage of each named layer that lies in a timm model, by its coarse `group_matcher`.

    Raises:
        FinetuneBNError: the model holds no timm model, so there are no stages.
    """
    stages: dict[str, int] = {}
    owners = [(n, m) for n, m in model.named_modules() if callable(getattr(m, "group_matcher", None))]
    if not owners:
        raise FinetuneBNError(
            complaint(
                "rule.stage",
                type(model).__name__,
                "a model that holds a whole timm model, which tells its stages (features_only=True leaves that out)",
                "Use a name pattern instead, such as 'layer4.*'.",
            )
        )
    from timm.models import group_modules

    for prefix, owner in owners:
        stage_of = group_modules(owner, owner.group_matcher(coarse=True), reverse=True)
        start = f"{prefix}." if prefix else ""
        for name in names:
            stage = stage_of.get(name[len(start) :]) if name.startswith(start) else None
            if stage is not None:
                stages.setdefault(name, int(stage))
    return stages


def is_leaf(module: nn.Module) -> bool:
    """Tell whether the module has no modules within."""
    return next(module.children(), None) is None and not isinstance(module, torch.jit.ScriptModule)
