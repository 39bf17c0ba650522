"""Which rule decides for which layer."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from finetune_bn.conversion.policies import (
    Rule,
)
from finetune_bn.errors import NoBatchNormMatched, UnsupportedLayer, complaint
from finetune_bn.layers.foreign import foreign_layer, is_foreign_frozen
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.group_norm import GroupNorm
from finetune_bn.layers.sites import (
    BatchNormSite,
    timm_stages,
)
from finetune_bn.layers.tracking import TrackingBatchNorm


def choose_rules(model: nn.Module, sites: Sequence[BatchNormSite], rules: Sequence[Rule]) -> list[Rule | None]:
    """Return the deciding rule for each site; raise where a rule decides nothing or names of one layer disagree."""
    names = [name for site in sites for name in site.names]
    stages = timm_stages(model, names) if any(rule.stage is not None for rule in rules) else {}

    def meets(rule: Rule, name: str, site: BatchNormSite) -> bool:
        if rule.type is None and is_foreign_frozen(site.module):
            return False
        return any(rule.matches([name], kind, stages.get(name)) for kind in kinds_of(site))

    def first(name: str, site: BatchNormSite) -> Rule | None:
        return next((rule for rule in rules if meets(rule, name, site)), None)

    choices: list[Rule | None] = []
    deciding: list[Rule | None] = []
    for site in sites:
        answers = [first(name, site) for name in site.names]
        deciding += answers
        policies = {answer.policy if answer else None for answer in answers}
        if len(policies) > 1:
            raise UnsupportedLayer(
                f"rules: the layer shared as {', '.join(site.names)} gets different policies under its names; "
                "write a rule that matches all of them."
            )
        choices.append(answers[0])
    for rule in rules:
        if not any(meets(rule, name, site) for site in sites for name in site.names):
            close = difflib.get_close_matches(rule.name or "", names, n=3, cutoff=0.3)
            seen = f"types {sorted({k for s in sites for k in kinds_of(s)})}, stages {sorted(set(stages.values()))}"
            remedy = f"Close names: {close}." if close else f"There are: {names[:5]}..., {seen}."
            raise NoBatchNormMatched(complaint("rule", rule.describe(), "conditions that match a layer", remedy))
        catch_all = rule.name == "*" and rule.stage is None and rule.type is None
        if not catch_all and not any(choice is rule for choice in deciding):
            raise NoBatchNormMatched(
                complaint(
                    "rule",
                    rule.describe(),
                    "a rule that decides at least one layer",
                    "Rules before it decide all that it matches: the first match wins, so put the special one first.",
                )
            )
    return choices


def kinds_of(site: BatchNormSite) -> set[str]:
    """Return the class names by which a rule may call the layer: a frozen one also by that of the BN it was."""
    ours = isinstance(site.module, (FrozenBatchNorm, TrackingBatchNorm, GroupNorm))
    before = (site.module.source if ours else None, foreign_layer(site.module))
    return {site.kind, *(type(layer).__name__ for layer in before if layer is not None)}
