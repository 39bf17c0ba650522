"""A dry run as data: what a policy would do to each BatchNorm layer of a model, and why."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from finetune_bn.conversion.new_layers import NEW_KEPT, is_kept, new_beside_pretrained
from finetune_bn.conversion.policies import (
    Freeze,
    FreezeAffine,
    Keep,
    NormalizeOnly,
    Policy,
    Rule,
    Rules,
    ToGroupNorm,
    check_policy,
    policy_from_dict,
)
from finetune_bn.conversion.producers import Feed, find_feeds
from finetune_bn.conversion.refusals import affine_sharers, known, notes, refusal
from finetune_bn.conversion.rules import choose_rules, kinds_of
from finetune_bn.conversion.training_run import run_in_training
from finetune_bn.errors import FinetuneBNError, NoBatchNormMatched, complaint
from finetune_bn.layers.frozen import LEARNABLE
from finetune_bn.layers.group_norm import number_of_groups
from finetune_bn.layers.sites import (
    BatchNormSite,
    find_batch_norms,
    find_foreign,
    find_lookalikes,
    positions_at,
    why_left_alone,
)
from finetune_bn.utilities.layer_figure import layer_figure
from finetune_bn.utilities.probe import Probe, can_run, find_probes
from finetune_bn.utilities.results import Result, Shown

BESIDE = (
    "its tensors are used beside the layer (torch.nn.functional.batch_norm, as in a graph traced through it), where no "
    "policy has a say: convert before tracing, or call the layer itself"
)

# The layer stays the BatchNorm that it is, so whoever uses its tensors meets the policy in them.
_SAME_LAYER = (Keep, FreezeAffine, NormalizeOnly)

log = logging.getLogger("finetune_bn")


@dataclass(frozen=True)
class PlanRow:
    """What happens to one layer.

    Attributes:
        names: all its names in the model.
        kind: class name of the layer.
        num_features: number of channels C; 0 where the layer is none that we know.
        policy: what happens to it; None where nothing does.
        reason: why; for a refused row, what stands in the way.
        refused: whether `convert` will refuse the whole plan because of this layer.
        position: what computes the layer's input, as far as a probe input told.
        folded_into: name of the convolution whose backward pass a frozen layer with a trained scale shares; "" where
            it keeps its input for its own.
        not_folded: why it does, where the policy asks for folding.
        folded_from: from how many images of the probe's size on a step does so; 0 where it never does.
    """

    names: tuple[str, ...]
    kind: str
    num_features: int
    policy: Policy | None
    reason: str
    refused: bool = False
    position: str = ""
    folded_into: str = ""
    not_folded: str = ""
    folded_from: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
        action = None if self.policy is None else self.policy.to_dict()
        return {
            "names": list(self.names),
            "kind": self.kind,
            "num_features": self.num_features,
            "action": action,
            "reason": self.reason,
            "refused": self.refused,
            "position": self.position,
            "folded_into": self.folded_into,
            "not_folded": self.not_folded,
            "folded_from": self.folded_from,
        }


@dataclass(frozen=True)
class Plan(Result):
    """What happens to each BatchNorm layer of a model; `print` it, store it, or hand it to `convert`.

    Attributes:
        model: class name of the model it was made for.
        rows: one a layer, in the order of definition.
    """

    model: str
    rows: tuple[PlanRow, ...]

    @property
    def refused(self) -> tuple[PlanRow, ...]:
        """The rows because of which `convert` would refuse."""
        return tuple(row for row in self.rows if row.refused)

    def folded_in(self, images: int) -> int:
        """Return how many layers share the backward pass of a convolution in a step of so many images.

        Args:
            images: the batch size; their height and width are those of the probe input.
        """
        return sum(0 < row.folded_from <= images for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, for checkpoints and JSON."""
        return {"model": self.model, "rows": [row.to_dict() for row in self.rows]}

    def to_json(self) -> str:
        """Return the plan as a JSON text, from which `from_dict` makes the same plan: no digit is left out."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Return the plan that `to_dict` described.

        Raises:
            FinetuneBNError: the data are no plan, or name a policy that there is not.
        """
        rows = []
        try:
            for row in data["rows"]:
                policy = None if row["action"] is None else policy_from_dict(row["action"])
                rest = {k: row[k] for k in ("kind", "num_features", "reason", "refused", "position")}
                rest |= {k: row.get(k, "") for k in ("folded_into", "not_folded")}  # older plans have none of the three
                rest["folded_from"] = row.get("folded_from", 0)
                names = tuple(row["names"])
                if not names or not all(isinstance(name, str) for name in names):
                    raise TypeError("names are texts")
                rows.append(PlanRow(names, policy=policy, **rest))
            return cls(data["model"], tuple(rows))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise FinetuneBNError(complaint("plan", data, "what Plan.to_dict returned")) from error

    def shown(self) -> Shown:
        """Return what happens in total, and a row a layer."""
        header = ("layer", "type", "C", "position", "what happens", "shares backward with", "why")
        body = [
            (
                " = ".join(name or "(root)" for name in row.names),
                row.kind,
                str(row.num_features or ""),
                row.position,
                _action(row),
                _sharing(row),
                row.reason,
            )
            for row in self.rows
        ]
        shown = [i for i in range(len(header)) if i in (0, 4) or any(line[i] for line in body)]
        counts = Counter(_action(row) for row in self.rows)
        total = ", ".join(f"{n} x {action}" for action, n in counts.most_common())
        sharing = sum(bool(row.folded_into) for row in self.rows)
        total += f"; {sharing} can share the backward pass of the convolution in front" if sharing else ""
        rows = [[line[i] for i in shown] for line in body]
        grouped = any(isinstance(row.policy, ToGroupNorm) and not row.refused for row in self.rows)
        notes = [_SLOW] if grouped else []
        return Shown(f"{self.model}: {total}", [header[i] for i in shown], rows, notes)

    def plot(self) -> Any:
        """Return a matplotlib figure: the channels of each layer, in the color of what happens to it."""
        actions = list(dict.fromkeys(map(_action, self.rows)))
        values = {
            action: [row.num_features if _action(row) == action else None for row in self.rows] for action in actions
        }
        names = [row.names[0] for row in self.rows]
        return layer_figure(f"{self.model}: what happens to each layer", names, {"channels": values}, stacked=True)


def plan(model: nn.Module, policy: Policy, example_input: Any = None, *, probe: bool = True) -> Plan:
    """Tell what `convert(model, policy)` would do to each BatchNorm layer; the model is not changed.

    Args:
        model: any module; not one that is already wrapped by `torch.compile`, DDP or FSDP.
        policy: a policy such as `Freeze(affine="none")`, or `Rules`.
        example_input: a tensor, tuple or dict that `model.forward` takes, to find out what feeds each layer. Not
            needed for timm models, nor for Lightning modules with an `example_input_array`.
        probe: False leaves out what feeds each layer, and does not run the model, except where ToGroupNorm leaves one
            channel a group, which a map of 1 x 1 would make zero.

    Raises:
        NoBatchNormMatched: the model has no BatchNorm, or a rule applies to no layer.
        FinetuneBNError: the model, the policy or the example input is none.
    """
    check_model(model)
    policy = check_policy(policy)
    given = policy.rules if isinstance(policy, Rules) else (Rule(policy, name="*"),)
    rules = [rule for rule in given if isinstance(rule, Rule)]
    sites = find_batch_norms(model, group_norms=True)
    # A frozen layer of another package is taken by a rule that names its class, and by no other.
    sites += [site for site in find_foreign(model) if any(rule.type == site.kind for rule in rules)]
    if not sites:
        _raise_none(model)
    choices = choose_rules(model, sites, rules)
    probes = (
        find_probes(model, example_input) if probe and can_run(model) else []
    )  # running a lazy layer would initialize it
    feeds = find_feeds(model, sites, probes) if probes else {}
    lonely = [s for s, rule in zip(sites, choices, strict=True) if rule is not None and _is_lonely(s, rule.policy)]
    sizes = positions_at(model, lonely, find_probes(model, example_input)) if lonely and can_run(model) else {}
    zeroed = {s.names[0]: sizes.get(s.names[0]) for s in lonely if _would_be_zero(s, sizes.get(s.names[0]))}
    shared = affine_sharers(model)
    rows = [
        _row(site, rule, feeds.get(site.names[0]), isinstance(policy, Rules), shared.get(id(site.module), ()))
        if site.names[0] not in zeroed
        else _frozen_instead(site, feeds.get(site.names[0]), zeroed[site.names[0]])
        for site, rule in zip(sites, choices, strict=True)
    ]
    if not isinstance(policy, Rules):
        rows = _new_kept(sites, rows, policy)
    if probes:
        rows = _unreached(model, sites, rows, feeds, probes)
    if feeds:
        _tell_always(rows)
    listed = {id(site.module) for site in sites}
    for name, module in find_lookalikes(model):
        if id(module) not in listed:
            rows.append(PlanRow((name,), type(module).__name__, 0, None, f"left alone: {why_left_alone(module)}"))
    return Plan(type(model).__name__, tuple(rows))


def _raise_none(model: nn.Module) -> NoReturn:
    known = Counter(type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__)
    others = [f"{name or '(root)'} {why_left_alone(module)}" for name, module in find_lookalikes(model)]
    remedy = f"Norm layers in it: {dict(known)}." + (f" {len(others)} are left alone: {others[0]}." if others else "")
    raise NoBatchNormMatched(complaint("model", type(model).__name__, "a model with BatchNorm layers", remedy))


def _new_kept(sites: Sequence[BatchNormSite], rows: Sequence[PlanRow], policy: Policy) -> list[PlanRow]:
    """Keep new layers beside pretrained ones live, where no rule says otherwise: there is nothing to freeze them at."""
    new = new_beside_pretrained(sites)
    kept = []
    for site, row in zip(sites, rows, strict=True):
        if row.names[0] in new and not row.refused and is_kept(site.module, policy):
            why = f"{NEW_KEPT} (mean 0, variance 1), and other layers have; Rules that match it freeze it all the same"
            row = PlanRow(row.names, row.kind, row.num_features, Keep(), why, False, row.position)
        kept.append(row)
    return kept


def _unreached(
    model: nn.Module,
    sites: Sequence[BatchNormSite],
    rows: Sequence[PlanRow],
    feeds: Mapping[str, Feed],
    probes: Sequence[Probe],
) -> list[PlanRow]:
    """Say of layers that no probe reached in eval mode whether training mode reaches them, or runs beside them."""
    idle = [site for site in sites if site.names[0] not in feeds]
    if not idle:
        return list(rows)
    run = run_in_training(model, probes, [site.module for site in idle])
    if not feeds and run.problem:  # an input that was guessed, and does not fit
        return list(rows)
    told = {}
    for i, site in enumerate(idle):
        if i in run.moved and i not in run.ran:
            told[site.names[0]] = BESIDE
        elif i not in run.ran:
            unknown = " (training mode failed)" if run.problem else " or training mode"
            told[site.names[0]] = f"no probe input reached it in eval{unknown}"
        else:
            told[site.names[0]] = "runs in training mode only"
    marked = []
    for row in rows:
        note = told.get(row.names[0])
        if note is not None and row.policy is not None and not row.refused:
            beside = note == BESIDE and not isinstance(row.policy, _SAME_LAYER)
            row = dataclasses.replace(row, reason=note if beside else "; ".join(filter(None, (row.reason, note))))
            row = dataclasses.replace(row, refused=beside, folded_into="", not_folded="") if beside else row
        marked.append(row)
    return marked


def check_model(model: object) -> None:
    """Raise unless `model` is a module whose layers can be replaced."""
    if not isinstance(model, nn.Module):
        raise FinetuneBNError(complaint("model", model, "a torch.nn.Module"))
    late = "Convert first, wrap afterwards."
    wrappers = {"OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule"}
    for name, part in model.named_modules():
        found = wrappers & {c.__name__ for c in type(part).__mro__}
        # A compiled part compiles anew when it next runs; what DDP and FSDP know of their parts is final.
        if (found and (not name or found != {"OptimizedModule"})) or (
            not name and isinstance(part, torch.jit.ScriptModule)
        ):
            given = f"{type(part).__name__}{f' as {name}' if name else ''}"
            raise FinetuneBNError(complaint("model", given, "the module before it is wrapped", late))


def _row(
    site: BatchNormSite, rule: Rule | None, feed: Feed | None, named_rule: bool, shared_with: Sequence[str] = ()
) -> PlanRow:
    position = feed.position if feed else ""
    if rule is None:
        return PlanRow(site.names, site.kind, site.num_features, None, "left alone: no rule matches", False, position)
    problem = refusal(site.module, rule.policy, shared_with)
    because = f"rule {rule.describe()}" if named_rule else ""
    if not problem:
        because = "; ".join(filter(None, (because, *notes(known(site.module), rule.policy, shared_with))))
    row = PlanRow(
        site.names, site.kind, site.num_features, rule.policy, problem or because, problem is not None, position
    )
    if problem or not may_fold(rule.policy):
        return row
    if feed is None or not feed.shares_with:
        why_not = "no probe input reached it" if feed is None else feed.why_not_shared
        return dataclasses.replace(row, not_folded=why_not)
    assert isinstance(rule.policy, Freeze)
    return dataclasses.replace(
        row, folded_into=feed.shares_with, folded_from=1 if rule.policy.fold == "always" else feed.shares_from
    )


def may_fold(policy: Policy) -> bool:
    """Tell whether layers under this policy may share the backward pass of a convolution: a scale is trained."""
    if isinstance(policy, Rules):
        return any(may_fold(rule.policy) for rule in policy.rules if isinstance(rule, Rule))
    if not isinstance(policy, Freeze) or policy.fold == "never" or policy.noise is not None:
        return False
    return "weight" in LEARNABLE[policy.affine]


def _tell_always(rows: Sequence[PlanRow]) -> None:
    """Warn where sharing was asked for wherever it can be, and it can be nowhere."""
    asked = [
        row
        for row in rows
        if isinstance(row.policy, Freeze) and row.policy.fold == "always" and may_fold(row.policy) and not row.refused
    ]
    if asked and not any(row.folded_into for row in asked):
        reasons = ", ".join(f"{n} x {why}" for why, n in Counter(row.not_folded for row in asked).most_common(3))
        log.warning("fold='always' changes nothing: not one layer can share the backward pass (%s)", reasons)


# By the training and inference benchmarks that timm publishes, of resnet50 and resnet50_gn.
_SLOW = (
    "On a GPU GroupNorm takes longer than BatchNorm: in eager channels_last a net may train at two fifths of the "
    "speed; compiled it loses less."
)


def _is_lonely(site: BatchNormSite, policy: Policy) -> bool:
    """Tell whether the policy puts each channel into a group of its own."""
    if not isinstance(policy, ToGroupNorm):
        return False
    return number_of_groups(site.num_features, policy.groups, policy.channels_per_group) == site.num_features


def _would_be_zero(site: BatchNormSite, positions: int | None) -> bool:
    """Tell whether one channel a group leaves nothing of an image; unknown sizes count as 1 where [N, C] is usual."""
    return positions == 1 or (positions is None and any("1d" in kind for kind in kinds_of(site)))


def _frozen_instead(site: BatchNormSite, feed: Feed | None, positions: int | None) -> PlanRow:
    known = "its maps have one position" if positions else "its maps may have one position (no example input tells)"
    why = f"frozen instead: {known}, and GroupNorm with one channel a group would return zero for it"
    row = _row(site, Rule(Freeze(), name="*"), feed, named_rule=False)
    return row if row.refused else dataclasses.replace(row, reason="; ".join(filter(None, (why, row.reason))))


def _sharing(row: PlanRow) -> str:
    if not row.folded_into:
        return f"- ({row.not_folded})" if row.not_folded else ""
    return row.folded_into + (f" (from {row.folded_from} images on)" if row.folded_from > 1 else "")


def _action(row: PlanRow) -> str:
    if row.refused:
        return "REFUSED"
    return "left alone" if row.policy is None else row.policy.describe()
