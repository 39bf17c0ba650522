"""What someone who carries out a plan should hear, with rules ready to paste."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

from finetune_bn.conversion.new_layers import NEW_KEPT, as_rules, as_yaml, is_new, new_beside_pretrained, patterns_for
from finetune_bn.conversion.plan import Plan, PlanRow
from finetune_bn.conversion.policies import Freeze, Keep, Policy
from finetune_bn.conversion.proofs import shortened
from finetune_bn.conversion.refusals import affine_sharers, alternative
from finetune_bn.layers.sites import find_batch_norms, is_batch_norm


def warnings_of(model: nn.Module, the_plan: Plan, policy: Policy) -> list[str]:
    """Return, a sentence each, what someone who carries out the plan should hear before, with rules ready to paste.

    Args:
        model: the model that the plan was made for, before or after the conversion.
        the_plan: what `plan(model, policy)` returned.
        policy: the policy.
    """
    return [*about_kept(model, the_plan, policy), *about_new(model, the_plan, policy), *about_others(model, the_plan)]


def about_kept(model: nn.Module, the_plan: Plan, policy: Policy) -> Iterator[str]:
    """Yield a sentence on the new layers that stay live, if there are any; see `warnings_of`."""
    sites = {site.names[0]: site for site in find_batch_norms(model)}
    rows = [row for row in the_plan.rows if row.names[0] in sites]
    kept = [row.names[0] for row in rows if row.reason.startswith(NEW_KEPT)]
    if kept:
        patterns = patterns_for(kept, list(sites))
        frozen, spared = ([*((name, what) for name in patterns), ("*", policy)] for what in (policy, Keep()))
        yield (
            f"{len(kept)} of {len(rows)} BatchNorm layers have seen no data (mean 0, variance 1) and stay live, as "
            f"there is nothing to freeze them at: {shortened(kept)}. To say so: {as_rules(spared)}, in a config "
            f"{as_yaml(spared)}. To freeze them all the same: {as_rules(frozen[-1:])}."
        )


def about_new(model: nn.Module, the_plan: Plan, policy: Policy) -> Iterator[str]:
    """Yield a sentence on the layers that are frozen as they are made, if there are any; see `warnings_of`."""
    sites = {site.names[0]: site for site in find_batch_norms(model)}
    rows = [row for row in the_plan.rows if row.names[0] in sites]
    by_policy = {row.names[0]: row.policy for row in rows if isinstance(row.policy, Freeze)}
    new = [name for name in by_policy if is_new(sites[name].module)]
    if new and set(new) <= new_beside_pretrained(list(sites.values())):
        pairs = [(name, Keep()) for name in patterns_for(new, list(sites))]
        given = [(rule.name, rule.policy) for rule in getattr(policy, "rules", ()) if rule.name is not None]
        yield (
            f"{len(new)} of {len(rows)} BatchNorm layers are frozen as they are made, at mean 0 and variance 1, beside "
            f"pretrained ones: {shortened(new)}. If their weights are not loaded yet, all is well; if they are new, "
            f"keep them: {as_rules([*pairs, *given])}, in a config {as_yaml([*pairs, *given])}."
        )
    elif new:
        yield (
            f"every layer that is frozen ({len(new)}) has the statistics of a new one (mean 0, variance 1): load the "
            "pretrained weights, before or now."
        )


def about_others(model: nn.Module, the_plan: Plan) -> Iterator[str]:
    """Yield a sentence on each kind of layer that is no BatchNorm of torch's; see `warnings_of`."""
    alone = [(row, dict(model.named_modules()).get(row.names[0])) for row in the_plan.rows if row.policy is None]
    strange = [row for row, module in alone if module is not None and not is_batch_norm(module)]
    reasons = Counter(row.reason.removeprefix("left alone: ") for row in strange)
    for reason, number in reasons.most_common(3):
        some = [row.names[0] or "(root)" for row in strange if row.reason.endswith(reason)]
        yield f"{number} layers are left alone ({shortened(some)}): each {reason}."


def way_out(model: nn.Module, rows: Sequence[PlanRow], layers: Sequence[nn.Module], refused: Sequence[str]) -> str:
    """Return rules under which the plan would be carried out: refused layers by other policies, the rest as asked."""
    names, shared = [name for name, _ in model.named_modules()], affine_sharers(model)
    others: dict[Policy, list[str]] = {}
    rest: dict[Policy, list[str]] = {}
    for row, layer in zip(rows, layers, strict=True):
        assert row.policy is not None
        if row.names[0] in refused:
            others.setdefault(alternative(layer, row.policy, shared.get(id(layer), ())), []).append(row.names[0])
        else:
            rest.setdefault(row.policy, []).append(row.names[0])
    pairs = [(name or "*", policy) for policy, some in others.items() for name in patterns_for(some, names)]
    known = sorted(rest.items(), key=lambda item: len(item[1]))
    for policy, some in known[:-1]:
        pairs += [(name, policy) for name in patterns_for(some, names)]
    return as_rules([*pairs, *(("*", policy) for policy, _ in known[-1:])])
