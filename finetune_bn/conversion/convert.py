"""Carry out a plan on a model, all or nothing, and undo it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finetune_bn.conversion.build import build_layer, check_solved_back, stays, undo
from finetune_bn.conversion.plan import Plan, PlanRow, check_model, may_fold, plan
from finetune_bn.conversion.policies import (
    Policy,
)
from finetune_bn.conversion.proofs import (
    CONVERTED,
    Proof,
    in_wide_copy,
    prove_in_training,
    prove_layer,
    prove_network,
    replace_modules,
    run_probes,
    sources_kept,
)
from finetune_bn.conversion.refusals import affine_sharers, refusal
from finetune_bn.conversion.remedies import warnings_of, way_out
from finetune_bn.conversion.training_run import buffers_restored
from finetune_bn.errors import (
    ConversionMismatch,
    NoBatchNormMatched,
    UnsupportedLayer,
    complaint,
)
from finetune_bn.functional.frozen import at_least_float32
from finetune_bn.layers.balance import balanced_map, unbalance
from finetune_bn.layers.foreign import foreign_layer, is_foreign_frozen
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.group_norm import GroupNorm
from finetune_bn.layers.hold_affine import is_held
from finetune_bn.layers.sites import find_batch_norms, is_batch_norm
from finetune_bn.layers.stochastic import EvalBatchNorm
from finetune_bn.layers.weights_seen import remember_weights
from finetune_bn.utilities.probe import Probe, can_run, distance, find_probes, quietly

log = logging.getLogger("finetune_bn")


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
    return _swap(model, lambda m: _build(m, the_plan), example_input, verify)


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
    return _swap(model, _build_revert, example_input, verify)


def _build_revert(model: nn.Module) -> list[_Swap]:
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if (isinstance(layer, CONVERTED) and is_batch_norm(layer)) or is_held(layer) or foreign_layer(layer) is not None
    ]
    if not layers:
        raise NoBatchNormMatched(
            complaint("model", type(model).__name__, "a model with layers that `convert` changed", "Nothing to revert.")
        )
    check_solved_back(layers)
    return [_Swap(name, layer, *undo(layer)) for name, layer in layers]


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
    shared = affine_sharers(model)
    problems = {
        row.names[0]: refusal(layer, row.policy, shared.get(id(layer), ()))
        for row, layer in zip(rows, layers, strict=True)
        if row.policy
    }
    refused = {name: why for name, why in problems.items() if why}
    if refused:
        reasons = "\n".join(f"  {name or '(root)'}: {why}" for name, why in refused.items())
        raise UnsupportedLayer(
            f"policy: {len(refused)} of {len(rows)} BatchNorm layers cannot take it, so nothing was changed.\n"
            f"{reasons}\n"
            f"Give them another policy by rules, as {way_out(model, rows, layers, list(refused))}."
        )
    changed = [(r.names[0], m) for r, m in zip(rows, layers, strict=True) if not stays(m, r.policy)]
    check_solved_back(changed)
    swaps = []
    for row, layer in zip(rows, layers, strict=True):
        assert row.policy is not None
        new, then = build_layer(layer, row.policy)
        if new is not layer or then is not None:
            swaps.append(_Swap(row.names[0], layer, new, then))
    return swaps


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


def _swap(model: nn.Module, build: Callable[[nn.Module], list[_Swap]], example_input: Any, verify: bool) -> nn.Module:
    """Put the new layers in place; where outputs must stay the same and do not, put the old ones back and raise."""
    with sources_kept(model):
        swaps = build(model)
        converted = _carry_out(model, swaps, build, example_input, verify)
    remember_weights(converted, [(swap.old, swap.new) for swap in swaps])
    return converted


def _carry_out(
    model: nn.Module,
    swaps: list[_Swap],
    build: Callable[[nn.Module], list[_Swap]],
    example_input: Any,
    verify: bool,
) -> nn.Module:
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
    converted = [swap for swap in swaps if isinstance(swap.new, CONVERTED) and swap.new is not swap.old]
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
        # In half precision rounding may destroy a network. Not where a `merged` layer is left: it was rounded before.
        wide_enough = any(p.dtype == torch.float32 for p in model.parameters()) or all(
            isinstance(swap.old, FrozenBatchNorm) and swap.old.affine_kind == "merged" for swap in swaps
        )
        in_values = isinstance(error, ConversionMismatch) and error.in_values
        if not in_values or not wide_enough or not _is_rounding(model, build, example_input):
            raise
        log.warning("the same function, proven in float64; this network amplifies rounding: %s", error)
        converted = replace_modules(model, replacements)
    return converted, proofs


def _change(model: nn.Module, swaps: list[_Swap], example_input: Any, verify: bool) -> tuple[nn.Module, list[Proof]]:
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
        y, reference = swap.new.normalize(x).double(), swap.new.source_output(x).double()
    return float((y - reference).square().mean().sqrt() / reference.std(0).square().mean().sqrt().clamp_min(1e-30))


def _is_rounding(model: nn.Module, build: Callable[[nn.Module], list[_Swap]], example_input: Any) -> bool:
    """Tell whether the same conversion of a float64 copy gives equal outputs, so that only rounding differed."""

    def off(wide: nn.Module, probes: list[Probe]) -> float:
        before = [probe.run(wide) for probe in probes]
        wide = replace_modules(wide, [(swap.old, swap.new) for swap in build(wide) if not swap.changes_function])
        return max((distance(p.run(wide), b) for p, b in zip(probes, before, strict=True)), default=0.0)

    return in_wide_copy(model, example_input, off)
