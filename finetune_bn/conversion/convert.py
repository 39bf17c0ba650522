"""Carry out a plan on a model, all or nothing, and undo it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from finetune_bn.conversion.folding import fold_plan, untied
from finetune_bn.conversion.new_layers import NEW_KEPT, as_rules, as_yaml, is_new, new_beside_pretrained, patterns_for
from finetune_bn.conversion.plan import Plan, PlanRow, check_model, may_fold, plan
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
from finetune_bn.conversion.proofs import (
    Proof,
    prove_in_training,
    prove_layer,
    prove_network,
    replace_modules,
    run_probes,
    shortened,
)
from finetune_bn.conversion.refusals import alternative, refusal
from finetune_bn.conversion.training_run import buffers_restored
from finetune_bn.errors import (
    ConversionMismatch,
    NoBatchNormMatched,
    UnsupportedLayer,
    complaint,
)
from finetune_bn.functional.frozen import at_least_float32
from finetune_bn.layers.balance import balanced_map, unbalance
from finetune_bn.layers.foreign import foreign_layer, is_foreign_frozen, laid_to_rest, revived
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.group_norm import GroupNorm
from finetune_bn.layers.hold_affine import hold_affine, is_held, release_affine, train_again
from finetune_bn.layers.noise import NoisyFrozenBatchNorm
from finetune_bn.layers.norm_act import EVAL, GHOST, GROUP, NOISY, RENORM, STOCHASTIC, Family, class_for, frozen_class
from finetune_bn.layers.sites import find_batch_norms, is_batch_norm
from finetune_bn.layers.stochastic import EvalBatchNorm
from finetune_bn.layers.tracking import TrackingBatchNorm
from finetune_bn.utilities.probe import can_run, distance, find_probes, quietly

log = logging.getLogger("finetune_bn")

# In float64, above what rounding leaves even of a network that amplifies it ten-million-fold, below any other cause.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class _Swap:
    """A layer of the model, what stands in its place, and what is done to that in place afterwards."""

    name: str
    old: nn.Module
    new: nn.Module
    then: Callable[[], None] | None = None

    @property
    def changes_function(self) -> bool:
        """Whether what the layer computes changes on purpose: to GroupNorm, from it, or from one to another."""
        return isinstance(self.old, GroupNorm) or isinstance(self.new, GroupNorm)


def convert(model: nn.Module, policy: Policy | Plan, *, example_input: Any = None, verify: bool = True) -> nn.Module:
    """Do to the BatchNorm layers of `model` what the policy says, in place, and return the model.

    All or nothing: everything is validated before the first layer is touched, and on any error the model is as it
    was. A conversion that claims the same function in eval mode proves it: every new layer against the old one on
    random input, and the network against itself on `example_input` (timm models and Lightning modules with an
    `example_input_array` need none); in float64 where the network amplifies the rounding of float32. EvalNorm, which
    is there to change it, is proven before it takes effect; ToGroupNorm cannot be, so all other layers are proven
    without it, and its errors are logged. Names, hooks, devices, dtypes, shared layers, `requires_grad` and, but for
    GroupNorm, the state-dict keys stay. Converting again changes the policy of what was converted; the same
    plan twice changes nothing.
    Convert before the optimizer is made: `merged` trains Parameters of its own.

    Args:
        model: any module, before `torch.compile`, DDP or FSDP wrap it. A BatchNorm itself is replaced: use the
            returned module.
        policy: a policy such as `Freeze(affine="none")`, `Rules`, or a `Plan` made earlier, also from a checkpoint.
        example_input: a tensor, tuple or dict that `model.forward` takes.
        verify: False skips both proofs.

    Raises:
        NoBatchNormMatched: no BatchNorm in the model, or a rule or plan that fits none of it.
        UnsupportedLayer: the policy asks of a layer what it cannot do; all such layers are named.
        ConversionMismatch: the outputs would differ; the first layer that breaks them is named.
        FinetuneBNError: an argument is wrong.
    """
    if isinstance(policy, Plan):
        the_plan = policy
    else:
        needs_probe = example_input is not None or (isinstance(policy, Policy) and may_fold(policy))
        the_plan = plan(model, policy, example_input, probe=needs_probe)
        for line in warnings_of(model, the_plan, policy):
            log.warning(line)
    check_model(model)
    names = {name for row in the_plan.rows if row.policy is not None for name in row.names}
    with untied([module for name, module in model.named_modules(remove_duplicate=False) if name in names]):
        converted = _swap(model, lambda m: _build(m, the_plan), example_input, verify)
    fold_plan(converted, the_plan, example_input, verify)
    return converted


def warnings_of(model: nn.Module, the_plan: Plan, policy: Policy) -> list[str]:
    """Return, a sentence each, what someone who carries out the plan should hear before, with rules ready to paste.

    Args:
        model: the model that the plan was made for, before or after the conversion.
        the_plan: what `plan(model, policy)` returned.
        policy: the policy.
    """
    lines = []
    sites = {site.names[0]: site for site in find_batch_norms(model)}
    rows = [row for row in the_plan.rows if row.names[0] in sites]
    kept = [row.names[0] for row in rows if row.reason.startswith(NEW_KEPT)]
    if kept:
        patterns = patterns_for(kept, list(sites))
        frozen, spared = ([*((name, what) for name in patterns), ("*", policy)] for what in (policy, Keep()))
        lines.append(
            f"{len(kept)} of {len(rows)} BatchNorm layers have seen no data (mean 0, variance 1) and stay live, as there "
            f"is nothing to freeze them at: {shortened(kept)}. To say so: {as_rules(spared)}, in a config "
            f"{as_yaml(spared)}. To freeze them all the same: {as_rules(frozen[-1:])}."
        )
    by_policy = {row.names[0]: row.policy for row in rows if isinstance(row.policy, Freeze)}
    new = [name for name in by_policy if is_new(sites[name].module)]
    if new and set(new) <= new_beside_pretrained(list(sites.values())):
        pairs = [(name, Keep()) for name in patterns_for(new, list(sites))]
        given = [(rule.name, rule.policy) for rule in getattr(policy, "rules", ()) if rule.name is not None]
        lines.append(
            f"{len(new)} of {len(rows)} BatchNorm layers are frozen as they are made, at mean 0 and variance 1, beside "
            f"pretrained ones: {shortened(new)}. If their weights are not loaded yet, all is well; if they are new, "
            f"keep them: {as_rules([*pairs, *given])}, in a config {as_yaml([*pairs, *given])}."
        )
    elif new:
        lines.append(
            f"every layer that is frozen ({len(new)}) has the statistics of a new one (mean 0, variance 1): load the "
            "pretrained weights, before or now."
        )
    alone = [(row, dict(model.named_modules()).get(row.names[0])) for row in the_plan.rows if row.policy is None]
    strange = [row for row, module in alone if module is not None and not is_batch_norm(module)]
    reasons = Counter(row.reason.removeprefix("left alone: ") for row in strange)
    for reason, number in reasons.most_common(3):
        some = [row.names[0] or "(root)" for row in strange if row.reason.endswith(reason)]
        lines.append(f"{number} layers are left alone ({shortened(some)}): each {reason}.")
    return lines


def revert(model: nn.Module, *, example_input: Any = None, verify: bool = True) -> nn.Module:
    """Turn every converted layer of `model` back into the BatchNorm it was, with today's values, in place.

    Untouched layers come back bit for bit, trained ones compute the same function in eval mode. Call it on a part of
    a model (`model.layer4`) to revert that part; a layer that the rest of the model shares stays converted there.

    Args:
        model: a module with converted layers; a converted root is replaced: use the returned module.
        example_input: a tensor, tuple or dict that `model.forward` takes, for the proof; see `convert`.
        verify: False skips the proof of equal outputs.

    Raises:
        NoBatchNormMatched: nothing in the model was converted.
    """
    check_model(model)
    with untied(list(model.modules())):
        return _swap(model, _build_revert, example_input, verify)


def _build_revert(model: nn.Module) -> list[_Swap]:
    converted = (FrozenBatchNorm, TrackingBatchNorm, GroupNorm)
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if (isinstance(layer, converted) and is_batch_norm(layer)) or is_held(layer) or foreign_layer(layer) is not None
    ]
    if not layers:
        raise NoBatchNormMatched(
            complaint("model", type(model).__name__, "a model with layers that `convert` changed", "Nothing to revert.")
        )
    return [_Swap(name, layer, *_undo(layer)) for name, layer in layers]


def _undo(layer: nn.Module) -> tuple[nn.Module, Callable[[], None] | None]:
    """Return what the layer was before any conversion: a BatchNorm, or a frozen layer of another package."""
    foreign = foreign_layer(layer)
    bn, then = _keep(layer, Keep())
    if foreign is None:
        return bn, then
    assert isinstance(bn, _BatchNorm)
    if then is not None:
        then()
    return laid_to_rest(bn), None


def _keep(layer: nn.Module, policy: Policy) -> tuple[nn.Module, Callable[[], None] | None]:
    bn = _as_batch_norm(layer)
    return bn, _releaser(bn) if is_held(bn) else None


def _freeze(layer: nn.Module, policy: Policy) -> tuple[nn.Module, Callable[[], None] | None]:
    assert isinstance(policy, Freeze)
    noise = layer.noise if isinstance(layer, NoisyFrozenBatchNorm) else None
    if isinstance(layer, FrozenBatchNorm) and (layer.affine_kind, noise) == (policy.affine, policy.noise):
        return layer, None
    bn = _as_batch_norm(layer)
    if policy.noise is None:
        frozen = frozen_class(bn).from_batch_norm(bn, policy.affine)
    else:
        frozen = class_for(bn, NOISY).from_batch_norm(bn, policy.affine, policy.noise)
    # What an earlier policy held constant is trained again where this one says so.
    return frozen, (lambda: train_again(bn, frozen)) if is_held(bn) else None


_FAMILIES: dict[type[Policy], Family[Any]] = {Ghost: GHOST, Renorm: RENORM, Stochastic: STOCHASTIC, EvalNorm: EVAL}


def _track(layer: nn.Module, policy: Policy) -> tuple[nn.Module, Callable[[], None] | None]:
    family = _FAMILIES[type(policy)]
    settings = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}  # type: ignore[arg-type]
    if isinstance(layer, family[0]) and layer.settings == settings:
        return layer, None
    bn = _as_batch_norm(layer)
    new = class_for(bn, family).from_batch_norm(bn, **settings)
    if isinstance(policy, EvalNorm):
        new.alpha = 0.0  # but for this it is a BatchNorm, and is proven as one

    def then() -> None:
        train_again(bn, new)
        if isinstance(policy, EvalNorm):
            new.alpha = policy.alpha

    return new, then if is_held(bn) or isinstance(policy, EvalNorm) else None


def _group(layer: nn.Module, policy: Policy) -> tuple[nn.Module, Callable[[], None] | None]:
    assert isinstance(policy, ToGroupNorm)
    settings = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    if isinstance(layer, GroupNorm) and layer.settings == settings:
        return layer, None
    bn = _as_batch_norm(layer)
    new = class_for(bn, GROUP).from_batch_norm(bn, **settings)
    return new, (lambda: train_again(bn, new)) if is_held(bn) else None


def _hold(layer: nn.Module, policy: Policy) -> tuple[nn.Module, Callable[[], None] | None]:
    bn = _as_batch_norm(layer)
    return bn, lambda: hold_affine(bn, reset=isinstance(policy, NormalizeOnly))


_BUILDERS: dict[type[Policy], Callable[[nn.Module, Policy], tuple[nn.Module, Callable[[], None] | None]]] = {
    Keep: _keep,
    Freeze: _freeze,
    FreezeAffine: _hold,
    NormalizeOnly: _hold,
    ToGroupNorm: _group,
    **dict.fromkeys(_FAMILIES, _track),
}


def _build(model: nn.Module, the_plan: Plan) -> list[_Swap]:
    """Validate the whole plan against the model and make the new layers, without touching the model."""
    check_model(model)
    listed = {name for row in the_plan.rows for name in row.names}
    unlisted = [
        site.names[0] for site in find_batch_norms(model, group_norms=True) if not listed.intersection(site.names)
    ]
    if unlisted:
        log.warning("%d BatchNorm layers are not in the plan and are left alone: %s", len(unlisted), unlisted)
    rows = [row for row in the_plan.rows if row.policy is not None]
    layers = [_find(model, row) for row in rows]
    problems = {row.names[0]: refusal(layer, row.policy) for row, layer in zip(rows, layers, strict=True) if row.policy}
    refused = {name: why for name, why in problems.items() if why}
    if refused:
        reasons = "\n".join(f"  {name or '(root)'}: {why}" for name, why in refused.items())
        raise UnsupportedLayer(
            f"policy: {len(refused)} of {len(rows)} BatchNorm layers cannot take it, so nothing was changed.\n"
            f"{reasons}\n"
            f"Give them another policy by rules, as {_way_out(model, rows, layers, list(refused))}."
        )
    swaps = []
    for row, layer in zip(rows, layers, strict=True):
        assert row.policy is not None
        new, then = _BUILDERS[type(row.policy)](layer, row.policy)
        if new is not layer or then is not None:
            swaps.append(_Swap(row.names[0], layer, new, then))
    return swaps


def _way_out(model: nn.Module, rows: Sequence[PlanRow], layers: Sequence[nn.Module], refused: Sequence[str]) -> str:
    """Return rules under which the plan would be carried out: the refused layers by other policies, the rest as asked."""
    names = [name for name, _ in model.named_modules()]
    others: dict[Policy, list[str]] = {}
    rest: dict[Policy, list[str]] = {}
    for row, layer in zip(rows, layers, strict=True):
        assert row.policy is not None
        if row.names[0] in refused:
            others.setdefault(alternative(layer, row.policy), []).append(row.names[0])
        else:
            rest.setdefault(row.policy, []).append(row.names[0])
    pairs = [(name or "*", policy) for policy, some in others.items() for name in patterns_for(some, names)]
    known = sorted(rest.items(), key=lambda item: len(item[1]))
    for policy, some in known[:-1]:
        pairs += [(name, policy) for name in patterns_for(some, names)]
    return as_rules([*pairs, *(("*", policy) for policy, _ in known[-1:])])


def _find(model: nn.Module, row: PlanRow) -> nn.Module:
    try:
        found = [model.get_submodule(name) for name in row.names]
    except AttributeError:
        found = []
    same = bool(found) and all(module is found[0] for module in found)
    if not same or _channels(found[0]) != row.num_features:
        given = f"{' = '.join(row.names)}: {row.kind} with {row.num_features} channels"
        raise NoBatchNormMatched(
            complaint(
                "plan", given, f"the BatchNorm layers of this {type(model).__name__}", "It was made for another model."
            )
        )
    return found[0]


def _channels(layer: nn.Module) -> int | None:
    """Return the number of channels of a layer that can be converted; None for any other."""
    if is_foreign_frozen(layer):
        return layer.get_buffer("weight").numel()
    return int(layer.num_features) if is_batch_norm(layer) else None  # type: ignore[arg-type]


def _as_batch_norm(layer: nn.Module) -> _BatchNorm:
    if isinstance(layer, (FrozenBatchNorm, TrackingBatchNorm, GroupNorm)):
        return layer.to_batch_norm()
    if is_foreign_frozen(layer):
        return revived(layer)
    assert isinstance(layer, _BatchNorm)
    return layer


def _releaser(module: nn.Module) -> Callable[[], None]:
    def release() -> None:
        assert isinstance(module, _BatchNorm)
        release_affine(module)

    return release


def _swap(model: nn.Module, build: Callable[[nn.Module], list[_Swap]], example_input: Any, verify: bool) -> nn.Module:
    """Put the new layers in place; where outputs must stay the same and do not, put the old ones back and raise."""
    swaps = build(model)
    left = [(swap.name, swap.old) for swap in swaps if isinstance(swap.old, GroupNorm) and swap.new is not swap.old]
    for name, layer in left:
        balanced_map(model, name, layer)  # raises where what was done to it cannot be undone
    same = [swap for swap in swaps if not swap.changes_function and swap.new is not swap.old]
    other = [swap for swap in swaps if swap.changes_function and swap.new is not swap.old]
    with contextlib.ExitStack() as stack:
        for swap in swaps:
            if isinstance(swap.old, EvalBatchNorm):
                stack.enter_context(swap.old.as_batch_norm())  # it differs from BatchNorm on purpose, and by this alone
        converted, proofs = _prove_and_replace(model, same, build, example_input, verify)
    try:
        converted, more = _change(converted, other, example_input, verify)
        ran = {id(replaced[i].new) for replaced, some in ((same, proofs), (other, more)) for p in some for i in p.ran}
        _prove_training(converted, proofs or more, swaps, ran)
    except BaseException:
        replace_modules(converted, [(swap.new, swap.old) for swap in swaps])
        raise
    for name, layer in left:
        unbalance(converted, name, layer)
    for swap in swaps:
        if swap.then is not None:
            swap.then()
    return converted


def _prove_training(model: nn.Module, proofs: Sequence[Proof], swaps: Sequence[_Swap], ran: set[int]) -> None:
    kinds = (FrozenBatchNorm, TrackingBatchNorm, GroupNorm)
    converted = [swap for swap in swaps if isinstance(swap.new, kinds) and swap.new is not swap.old]
    if not proofs or not converted:
        return
    with contextlib.ExitStack() as stack:  # an old layer that the model still holds somewhere must not learn from it
        for swap in converted:
            stack.enter_context(buffers_restored(swap.old))
        in_eval = frozenset(i for i, swap in enumerate(converted) if id(swap.new) in ran)
        prove_in_training(model, proofs, [(swap.name, swap.new) for swap in converted], in_eval)


def _prove_and_replace(
    model: nn.Module, swaps: list[_Swap], build: Callable[[nn.Module], list[_Swap]], example_input: Any, verify: bool
) -> tuple[nn.Module, list[Proof]]:
    replacements = [(swap.old, swap.new) for swap in swaps]
    proofs: list[Proof] = []
    if verify and replacements and can_run(model):
        for swap in swaps:
            prove_layer(swap.name, swap.old, swap.new)
        proofs = run_probes(model, find_probes(model, example_input), [old for old, _ in replacements])
    converted = replace_modules(model, replacements)
    try:
        # An old layer that the model still holds somewhere must not take the probe for a training batch.
        with contextlib.ExitStack() as stack:
            for old, _ in replacements:
                stack.enter_context(quietly(old))
            for proof in proofs:
                prove_network(converted, proof, replacements)
    except BaseException as error:
        replace_modules(converted, [(new, old) for old, new in replacements])
        if not (isinstance(error, ConversionMismatch) and error.in_values) or not _is_rounding(
            model, build, example_input
        ):
            raise
        log.warning("the same function, proven in float64; this network amplifies float32 rounding: %s", error)
        converted = replace_modules(model, replacements)
    return converted, proofs


def _change(
    model: nn.Module, swaps: list[_Swap], example_input: Any, verify: bool
) -> tuple[nn.Module, list[Proof]]:
    """Replace layers that are to compute something else; of the network it is proven that it runs through them."""
    pairs = [(swap.old, swap.new) for swap in swaps]
    if not verify or not pairs or not can_run(model):
        return replace_modules(model, pairs), []
    proofs = run_probes(model, find_probes(model, example_input), [old for old, _ in pairs])
    converted = replace_modules(model, pairs)
    try:
        for proof in proofs:
            prove_network(converted, proof, pairs, changed=True)
    except BaseException:
        replace_modules(converted, [(new, old) for old, new in pairs])
        raise
    errors = [(_layer_error(swap), swap.name) for swap in swaps if isinstance(swap.new, GroupNorm)]
    known = sorted((error, name) for error, name in errors if error is not None)
    if known:
        log.info(
            "GroupNorm in place of BatchNorm changes what the network computes: on noise with the statistics of its "
            "BatchNorm, a layer's output is off by %.2f of its standard deviation (median of %d), at most %.2f (%s)",
            known[len(known) // 2][0],
            len(known),
            known[-1][0],
            known[-1][1] or "(root)",
        )
    return converted, proofs


def _layer_error(swap: _Swap) -> float | None:
    """Return by how much a GroupNorm differs from its BatchNorm on noise; None where that has no statistics."""
    assert isinstance(swap.new, GroupNorm)
    bn = swap.new.source
    assert bn is not None
    if bn.running_mean is None or bn.running_var is None:
        return None
    mean, sd = at_least_float32(bn.running_mean), at_least_float32(bn.running_var).sqrt()
    noise = torch.randn(16, mean.numel(), 64, generator=torch.Generator().manual_seed(0)).to(mean)
    x = (noise * sd[:, None] + mean[:, None]).to(swap.new.weight)
    with torch.no_grad():
        y, reference = swap.new._normalize(x).double(), swap.new._as_batch_norm(x).double()
    return float((y - reference).square().mean().sqrt() / reference.std(0).square().mean().sqrt().clamp_min(1e-30))


def _is_rounding(model: nn.Module, build: Callable[[nn.Module], list[_Swap]], example_input: Any) -> bool:
    """Tell whether the same conversion of a float64 copy gives equal outputs, so that only rounding differed."""
    if not any(p.dtype == torch.float32 for p in model.parameters()):
        return False
    try:
        wide = copy.deepcopy(model).double()
        probes = find_probes(wide, tree_map_only(Tensor, _double, example_input))
        before = [probe.run(wide) for probe in probes]
        wide = replace_modules(wide, [(swap.old, swap.new) for swap in build(wide) if not swap.changes_function])
        return all(distance(p.run(wide), b) <= _ROUNDING for p, b in zip(probes, before, strict=True))
    except Exception:  # a network that cannot be copied, or computes in float32 alone, is left to its first verdict
        return False


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
