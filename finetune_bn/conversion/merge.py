"""Norm layers merged into the weights in front of them for good: a network of torch's own layers, for deployment."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from finetune_bn.conversion.plan import check_model
from finetune_bn.conversion.producers import find_feeds
from finetune_bn.conversion.proofs import in_wide_copy, replace_modules, sources_kept
from finetune_bn.errors import ConversionMismatch, FinetuneBNError, NoBatchNormMatched, UnsupportedLayer, complaint
from finetune_bn.functional.fold import merged_weight
from finetune_bn.functional.frozen import TOLERANCE, scale_shift
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.group_norm import GroupNorm
from finetune_bn.layers.norm_act import has_known_forward, modules_behind
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.layers.stand_in import share_hooks
from finetune_bn.layers.stochastic import EvalBatchNorm
from finetune_bn.layers.tracking import TrackingBatchNorm
from finetune_bn.utilities.probe import Probe, can_run, distance, find_probes

log = logging.getLogger("finetune_bn")


@dataclass(frozen=True)
class _Merge:
    """A norm layer and what stands in its place; the map whose weight and bias change, or why there is none."""

    name: str
    norm: nn.Module
    new: nn.Module
    producer: nn.Module | None = None
    values: tuple[nn.Parameter | None, nn.Parameter | None] = (None, None)
    why_not: str = ""


def fold(model: nn.Module, example_input: Any = None) -> nn.Module:
    """Merge each BatchNorm, live or frozen, into the convolution or linear map in front of it, for good.

    For deployment, not for training: the merged network computes the same in eval mode, and would learn at other rates
    (those of a channel's weights (var + eps) / gamma^2 times as large). A layer that fits into nothing in front of it
    stays, as the BatchNorm of torch or timm that it was or stands for; which ones, and why, is logged. What was
    converted to GroupNorm becomes torch's. No layer of this package is left, so the model can be pickled for machines
    without it. All or nothing: on any error the model is as it was.

    Args:
        model: any module with BatchNorm layers, before `torch.compile`, DDP or FSDP wrap it.
        example_input: a tensor, tuple or dict that `model.forward` takes. Not needed for timm models, nor for Lightning
            modules with an `example_input_array`.

    Returns:
        The model, changed in place, in eval mode; a BatchNorm that is the root may be replaced.

    Raises:
        NoBatchNormMatched: the model has no BatchNorm.
        UnsupportedLayer: it has layers of this package that no BatchNorm in eval mode stands for.
        ConversionMismatch: the outputs would differ.
        FinetuneBNError: an argument is wrong.
    """
    check_model(model)
    if not find_batch_norms(model, group_norms=True):
        raise NoBatchNormMatched(complaint("model", type(model).__name__, "a model with BatchNorm layers"))
    if not can_run(model):
        remedy = "Run it once (lazy layers), or load its weights (meta device), first."
        raise FinetuneBNError(complaint("model", type(model).__name__, "a model whose tensors have values", remedy))
    foreign = [f"{n or '(root)'} ({type(m).__name__})" for n, m in model.named_modules() if _has_no_torch_layer(m)]
    if foreign:
        raise UnsupportedLayer(
            complaint("model", foreign, "layers that a BatchNorm in eval mode stands for", "Revert those first.")
        )
    probes = find_probes(model, example_input)
    if not probes:
        raise FinetuneBNError(complaint("example_input", None, f"what {type(model).__name__}.forward takes"))
    with sources_kept(model):
        folded, merges, off = _merge(model, probes)
        allowed = allowed_distance(model)
        if not off <= allowed:
            model, _ = _exchange(folded, merges)
            if not in_wide_copy(model, example_input, lambda wide, found: _merge(wide, found)[2]):
                raise ConversionMismatch(
                    f"the network: outputs before and after differ by {off:.2g} of the largest value; allowed: "
                    f"{allowed:.0e}. Nothing was changed.",
                    in_values=True,
                )
            log.warning("the same function, proven in float64; this network amplifies float32 rounding by %.0e", off)
            folded, merges, _ = _merge(model, probes)
    left = {merge.name or "(root)": merge.why_not for merge in merges if merge.why_not}
    log.info("%d of %d BatchNorm layers merged", len(merges) - len(left), len(merges))
    if left:
        why = "; ".join(f"{n} x {reason}" for reason, n in Counter(left.values()).most_common())
        log.warning("%d of %d BatchNorm layers stay: %s. Why: %s", len(left), len(merges), ", ".join(left), why)
    return folded.eval()


def _has_no_torch_layer(module: nn.Module) -> bool:
    """Tell whether the module is a layer of this package, and no BatchNorm computes what it does in eval mode."""
    if isinstance(module, EvalBatchNorm) or (isinstance(module, GroupNorm) and module.alpha):
        return True
    ours = type(module).__module__.startswith("finetune_bn.layers.")
    return ours and not isinstance(module, (FrozenBatchNorm, TrackingBatchNorm, GroupNorm))


def allowed_distance(model: nn.Module) -> float:
    """Return by how much outputs of the model may differ that it computes in another order, see `TOLERANCE`."""
    return max((TOLERANCE.get(p.dtype, 0.0) for p in model.parameters()), default=TOLERANCE[torch.float32])


def _merge(model: nn.Module, probes: list[Probe]) -> tuple[nn.Module, list[_Merge], float]:
    """Carry all merges out; return the root, the merges that undo them, and by how much the outputs differ now."""
    before = [probe.run(model) for probe in probes]
    folded, undo = _exchange(model, _plan(model, probes))
    try:
        after = [probe.run(folded) for probe in probes]
    except BaseException as error:
        _exchange(folded, undo)
        raise ConversionMismatch(
            f"the network: it took the probe input before, and with its norm layers merged it raises "
            f"{error.__cause__ or error!r}. Nothing was changed."
        ) from error
    return folded, undo, max(distance(a, b) for a, b in zip(after, before, strict=True))


def _plan(model: nn.Module, probes: list[Probe]) -> list[_Merge]:
    """Return the merges with all their new tensors, computed aside: the model is not touched."""
    sites = find_batch_norms(model)
    feeds = find_feeds(model, sites, probes)
    merges = [_Merge(n, m, _torch_group_norm(m)) for n, m in model.named_modules() if isinstance(m, GroupNorm)]
    for site in sites:
        name, norm, feed = site.names[0], site.module, feeds.get(site.names[0])
        why_not = _why_not(norm) or ("no probe input reaches it" if feed is None else feed.why_not)
        if why_not or feed is None:
            stuck = norm.why_not_solved_back() if isinstance(norm, FrozenBatchNorm) else None
            if stuck:
                raise UnsupportedLayer(f"{name or '(root)'}: this layer cannot turn back into a BatchNorm: {stuck}")
            plain = norm.to_batch_norm() if isinstance(norm, (FrozenBatchNorm, TrackingBatchNorm)) else norm
            merges.append(_Merge(name, norm, plain, why_not=why_not))
            continue
        producer = model.get_submodule(feed.producer)
        merges.append(_Merge(name, norm, _without_affine(norm), producer, _merged(producer, norm)))
    return merges


def _why_not(norm: nn.Module) -> str:
    if isinstance(norm, FrozenBatchNorm):
        return ""
    assert isinstance(norm, _BatchNorm)
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    return "" if has_known_forward(norm) else "it has a forward of its own"


def _without_affine(norm: nn.Module) -> nn.Module:
    """Return what the layer does besides its affine: its drop layer and its activation, under its hooks."""
    behind = [module for module in modules_behind(norm) if not isinstance(module, nn.Identity)]
    new = nn.Sequential(*behind) if behind else nn.Identity()
    share_hooks(norm, new)
    return new


def _torch_group_norm(norm: GroupNorm) -> nn.Module:
    """Return torch's GroupNorm with the tensors of `norm`, and behind it what is behind that, under its hooks."""
    plain = nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps, affine=False)
    for name in ("weight", "bias"):
        tensor = getattr(norm, name)
        plain.register_parameter(name, nn.Parameter(tensor, requires_grad=tensor.requires_grad))
    plain.affine = True
    behind = [module for module in modules_behind(norm) if not isinstance(module, nn.Identity)]
    new = nn.Sequential(plain, *behind) if behind else plain
    share_hooks(norm, new)
    return new


@torch.no_grad()
def _merged(producer: nn.Module, norm: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Return weight and bias of a convolution or linear map that computes the affine of `norm` as well."""
    weight = producer.get_parameter("weight")
    scale, shift = scale_shift(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)  # type: ignore[arg-type]
    new = merged_weight(
        weight,
        producer.bias,  # type: ignore[arg-type]
        scale,
        shift,
        transposed=isinstance(producer, _ConvTransposeNd),
        groups=getattr(producer, "groups", 1),
    )
    return tuple(nn.Parameter(tensor, requires_grad=weight.requires_grad) for tensor in new)  # type: ignore[return-value]


def _exchange(model: nn.Module, merges: list[_Merge]) -> tuple[nn.Module, list[_Merge]]:
    """Put the new layers and tensors in place; return the (possibly new) root, and the merges that undo it."""
    undo = []
    for merge in merges:
        values = merge.values
        if merge.producer is not None:
            own = merge.producer._parameters
            values = own["weight"], own["bias"]
            own["weight"], own["bias"] = merge.values
        undo.append(replace(merge, norm=merge.new, new=merge.norm, values=values))
    return replace_modules(model, [(merge.norm, merge.new) for merge in merges if merge.norm is not merge.new]), undo
