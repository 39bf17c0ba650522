"""What stands in the way of a policy on one layer, and what someone who asks for it should know."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from finetune_bn.conversion.policies import (
    EvalNorm,
    Freeze,
    FreezeAffine,
    Ghost,
    Keep,
    NormalizeOnly,
    Policy,
    Renorm,
    Stochastic,
    ToGroupNorm,
)
from finetune_bn.layers.foreign import is_foreign_frozen, revived, why_not_revived
from finetune_bn.layers.frozen import LEARNABLE, Affine, FrozenBatchNorm, why_not_frozen
from finetune_bn.layers.group_norm import GroupNorm, number_of_groups, why_not_group_norm
from finetune_bn.layers.hold_affine import changes_function, is_held
from finetune_bn.layers.norm_act import has_known_forward, is_norm_act
from finetune_bn.layers.tracking import TrackingBatchNorm, why_not_tracking

_TRACKING = (Ghost, Renorm, Stochastic, EvalNorm)
_FIVE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def known(layer: nn.Module) -> nn.Module:
    """Return the layer itself, or the BatchNorm that a frozen layer of another package is brought back to life as."""
    return revived(layer) if is_foreign_frozen(layer) and why_not_revived(layer) is None else layer


def affine_sharers(model: nn.Module) -> dict[int, list[str]]:
    """Return, by the id of a module, the names of the others whose weight or bias are the very same Parameters.

    Domain-specific BatchNorm is made so: a layer for each domain, with statistics of its own and one gamma and beta.
    """
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((name, module))
    found: dict[int, list[str]] = {}
    for parts in holders.values():
        for _, module in parts:
            others = found.setdefault(id(module), [])
            others += [name for name, other in parts if other is not module and name not in others]
    return {key: names for key, names in found.items() if names}


def refusal(bn: nn.Module, policy: Policy, shared_with: Sequence[str] = ()) -> str | None:
    """Return why `policy` cannot be carried out on a layer, or None where it can.

    Args:
        bn: the layer.
        policy: what is to happen to it.
        shared_with: the modules that share its gamma or beta, see `affine_sharers`.
    """
    if is_foreign_frozen(bn) and why_not_revived(bn) is not None:
        return why_not_revived(bn)
    if isinstance(policy, Keep):
        return None
    bn = known(bn)
    if any(is_lazy(t) for t in [*bn.parameters(False), *bn.buffers(False)]):
        return "is not initialized yet (a lazy layer): run the model once first"
    if shared_with and isinstance(policy, Freeze) and policy.affine == "merged":
        return (
            f"shares gamma or beta with {', '.join(shared_with)}: with the statistics merged into them each layer "
            "would train numbers of its own; affine='original' and 'shift' keep what is shared shared"
        )
    values: Mapping[str, Tensor | None] = bn._parameters
    tracking = bn if isinstance(bn, TrackingBatchNorm) else None
    if isinstance(bn, GroupNorm):
        if "forward" in vars(bn):
            return f"{type(bn).__module__}.{type(bn).__qualname__} has a forward patched in"
        if parametrize.is_parametrized(bn):
            return "has parametrized tensors (torch.nn.utils.parametrize): remove the parametrizations first"
        assert bn.source is not None
        bn = bn.source
    if isinstance(bn, FrozenBatchNorm):
        source = bn.source or bn.new_batch_norm()
        values = bn.values_for(source)
        bn = source
    elif tracking is not None and has_known_forward(tracking):
        bn = tracking.source or tracking.new_batch_norm()
    if any(parametrize.is_parametrized(layer) for layer in (bn, tracking) if layer is not None):
        return "has parametrized tensors (torch.nn.utils.parametrize): remove the parametrizations first"
    if not has_known_forward(bn):  # type: ignore[arg-type]
        kind = f"{type(bn).__module__}.{type(bn).__qualname__}"
        patched = "forward" in vars(bn)
        return f"{kind} has a forward patched in" if patched else f"is a subclass with a forward of its own ({kind})"
    if isinstance(policy, (Freeze, ToGroupNorm, *_TRACKING)):
        own = (*_FIVE, "drop", "act") if is_norm_act(bn) else _FIVE
        extra = [name for part in (bn._parameters, bn._buffers, bn._modules) for name in part if name not in own]
        kind = "a frozen layer" if isinstance(policy, Freeze) else f"a layer for {type(policy).__name__}"
        if extra:
            return f"holds {', '.join(extra)} besides BatchNorm's five tensors, which {kind} would lose"
        layer = tracking or bn  # the statistics of today, where they are live
        if isinstance(policy, Freeze):
            return why_not_frozen(layer, policy.affine)  # type: ignore[arg-type]
        if isinstance(policy, ToGroupNorm):
            return why_not_group_norm(layer, policy.init)  # type: ignore[arg-type]
        return why_not_tracking(layer)
    if bn.weight is None and bn.bias is None:
        return "has no weight and no bias to hold constant; Keep() would do the same"
    if (
        isinstance(policy, NormalizeOnly)
        and not policy.change_function
        and changes_function(values["weight"], values["bias"])
    ):
        return (
            "its gamma and beta are not 1 and 0: resetting them changes what the pretrained layer computes; "
            "NormalizeOnly(change_function=True) does it all the same, FreezeAffine() keeps the values"
        )
    return None


def alternative(layer: nn.Module, policy: Policy, shared_with: Sequence[str] = ()) -> Policy:
    """Return what could be done to a layer that refuses `policy`: the nearest kind of `Freeze`, else nothing."""
    if isinstance(policy, Freeze):
        kinds: tuple[Affine, ...] = ("original", "shift", "none")
        for kind in kinds:
            other = dataclasses.replace(policy, affine=kind)
            if refusal(layer, other, shared_with) is None:
                return other
    return Keep()


def notes(bn: nn.Module, policy: Policy, shared_with: Sequence[str] = ()) -> Iterator[str]:
    """Yield what someone who does this to the live layer should know."""
    if shared_with and isinstance(policy, (FreezeAffine, NormalizeOnly)):
        yield f"gamma and beta are shared with {', '.join(shared_with)}, where they are held constant as well"
    if shared_with and (
        isinstance(policy, ToGroupNorm) or (isinstance(policy, Freeze) and policy.affine != "original")
    ):
        what = "gamma" if isinstance(policy, Freeze) and policy.affine == "shift" else "gamma and beta"
        yield f"shares {what} with {', '.join(shared_with)}: it gets a copy, which does not follow that"
    if isinstance(policy, ToGroupNorm):
        number = number_of_groups(bn.num_features, policy.groups, policy.channels_per_group)  # type: ignore[arg-type]
        asked = policy.groups if policy.channels_per_group is None else policy.channels_per_group
        got = number if policy.channels_per_group is None else bn.num_features // number  # type: ignore[operator]
        if asked not in ("auto", got):
            unit = "groups" if policy.channels_per_group is None else "channels a group"
            yield f"{got} {unit}: {bn.num_features} channels are no multiple of {asked}"
        if policy.init == "sequential":
            yield "closed form until calibrate_group_norm(model, batches) has fitted it to images"
    goes_by = (Freeze, ToGroupNorm, *_TRACKING)
    if isinstance(bn, (FrozenBatchNorm, GroupNorm)) or not isinstance(policy, goes_by):
        return
    if isinstance(policy, _TRACKING) and isinstance(bn, nn.SyncBatchNorm):
        yield "each process will normalize by images of its own: they are no longer synchronized"
    trained = LEARNABLE[policy.affine] if isinstance(policy, Freeze) else ()
    off = [name for name in trained if getattr(bn, name) is not None and not getattr(bn, name).requires_grad]
    if off and not is_held(bn):
        yield f"{' and '.join(off)} keep requires_grad=False"
    mean, var = bn.running_mean, bn.running_var
    if mean is None:  # as ToGroupNorm may do without
        return
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    goes_by_them = isinstance(policy, (Freeze, ToGroupNorm, Renorm, Stochastic)) and not mean.is_meta
    if goes_by_them and not mean.any() and bool((var == 1).all()):
        yield "its statistics are those of a new layer (mean 0, variance 1): are the pretrained weights loaded?"
