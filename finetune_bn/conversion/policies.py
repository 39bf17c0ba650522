"""What may happen to a BatchNorm layer, as data: one frozen dataclass a policy, and rules that pick among them."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.functional.shared_backward import FOLD_MODES, FoldMode
from finetune_bn.layers.frozen import Affine, check_affine
from finetune_bn.layers.ghost import check_groups
from finetune_bn.layers.group_norm import Eps, Init, check_grouping
from finetune_bn.layers.noise import check_noise
from finetune_bn.layers.renorm import check_limits, check_momentum
from finetune_bn.layers.stochastic import check_alpha, check_probability
from finetune_bn.utilities.checks import choice


class Policy:
    """What happens to the BatchNorm layers that it is applied to."""

    def describe(self) -> str:
        """Return the policy in a few words, for tables."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as plain data, for checkpoints and JSON; `policy_from_dict` is the inverse."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {"policy": type(self).__name__} | {field.name: getattr(self, field.name) for field in fields}


@dataclass(frozen=True)
class Keep(Policy):
    """BatchNorm as PyTorch has it: batch statistics in training. For large, i.i.d. batches.

    A layer that was converted earlier is reverted.
    """

    def describe(self) -> str:
        """Return the policy in a few words, for tables."""
        return "keep"


@dataclass(frozen=True)
class Freeze(Policy):
    """Fix the statistics for good: gamma' x + beta', in training as in evaluation. The default for small batches.

    Args:
        affine: what is trained: `none` (gamma', beta' constant), `shift` (beta' alone, costs no activation memory),
            `merged` (gamma' and beta'), `original` (BN's own gamma and beta over the fixed statistics).
        noise: keep the noise that statistics have in i.i.d. batches of so many images: in training each batch is
            normalized by statistics drawn around the fixed ones. It regularizes as BatchNorm does, and no image
            depends on another. None: no noise. Not with `merged`.
        fold: whether a layer whose scale is trained takes part in the backward pass of the convolution in front, so
            that it keeps no activation for itself (Tune mode). All tensors of the forward pass stay what they are.
            `auto`: where that is cheaper, decided in each step; `always`: wherever it can be done; `never`.
    """

    affine: Affine = "none"
    noise: int | None = None
    fold: FoldMode = "auto"

    def __post_init__(self) -> None:
        check_affine(self.affine)
        choice("fold", self.fold, FOLD_MODES)
        if self.noise is not None:
            check_noise(self.noise, self.affine)

    def describe(self) -> str:
        """Return the policy in a few words, for tables."""
        noise = "" if self.noise is None else f", noise of {self.noise} images"
        fold = "" if self.fold == "auto" else f", fold={self.fold}"
        return f"freeze, affine={self.affine}{noise}{fold}"


@dataclass(frozen=True)
class FreezeAffine(Policy):
    """Batch statistics in training, gamma and beta constant at their pretrained values."""

    def describe(self) -> str:
        """Return the policy in a few words, for tables."""
        return "live statistics, affine constant"


@dataclass(frozen=True)
class NormalizeOnly(Policy):
    """Batch statistics in training, gamma = 1 and beta = 0 constant.

    Args:
        change_function: a pretrained layer has other values of gamma and beta, and setting them to 1 and 0 throws
            part of the pretraining away. Refused unless this is true.
    """

    change_function: bool = False

    def describe(self) -> str:
        """Return the policy in a few words, for tables."""
        return "normalize only (gamma=1, beta=0)"


@dataclass(frozen=True)
class Ghost(Policy):
    """Statistics of part of the batch in training: of each of the groups `x[i::groups]`.

    For batches of P labels with K images each, label by label, as P x K samplers make them: with `groups` = K each
    group holds one image of each label, so images of one label never share statistics. The running statistics, by
    which the network is evaluated, follow those of the whole batch.

    Args:
        groups: number of groups in a batch, 2 or more: K, the images of a label.
    """

    groups: int

    def __post_init__(self) -> None:
        check_groups(self.groups, 2)

    def describe(self) -> str:
        """Return the policy in a few words, for tables."""
        return f"ghost batches x[i::{self.groups}]"


@dataclass(frozen=True)
class Renorm(Policy):
    """Batch renormalization (Ioffe 2017) from the pretrained statistics: trained as it will be evaluated.

    In training the running statistics normalize, drawn towards the batch's where those are out of reach, and the
    gradient is BatchNorm's. With `r_max` and `d_max` inf the forward pass is a frozen one; with 1 and 0 it is
    BatchNorm's.

    Args:
        r_max: by what factor the standard deviations of batch and running statistics may differ: 1 or more, or inf
            (`.inf` in YAML).
        d_max: by how many running standard deviations their means may differ: 0 or more, or inf.
        bn_steps: training batches with the limits 1 and 0, before they grow.
        ramp_steps: training batches over which the limits grow to `r_max` and `d_max`.
        momentum: share of a new batch in the running statistics; 0 keeps the pretrained ones. None: the layers' own,
            as a rule 0.1 (the paper: 0.01).
    """

    r_max: float = 3.0
    d_max: float = 5.0
    bn_steps: int = 0
    ramp_steps: int = 0
    momentum: float | None = None

    def __post_init__(self) -> None:
        for name in ("r_max", "d_max"):
            if getattr(self, name) == "inf":  # as JSON holds it
                object.__setattr__(self, name, math.inf)
        check_limits(self.r_max, self.d_max, self.bn_steps, self.ramp_steps)
        check_momentum(self.momentum)

    def describe(self) -> str:
        """Return the policy in a few words, for tables."""
        steps = f", {self.bn_steps} + {self.ramp_steps} steps" if self.bn_steps or self.ramp_steps else ""
        momentum = "" if self.momentum is None else f", momentum={self.momentum:g}"
        return f"batch renorm, r_max={self.r_max:g}, d_max={self.d_max:g}{steps}{momentum}"

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as plain data; JSON has no number for infinity, so it is the text "inf"."""
        return {name: "inf" if value == math.inf else value for name, value in super().to_dict().items()}


@dataclass(frozen=True)
class Stochastic(Policy):
    """Stochastic normalization (Kou et al. 2020): batch statistics in some channels, running ones in the others.

    Drawn anew for each channel and training batch. Evaluation is BatchNorm's.

    Args:
        p: probability that a channel goes by the statistics of the batch.
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        check_probability(self.p)

    def describe(self) -> str:
        """Return the policy in a few words, for tables."""
        return f"stochastic norm, p={self.p:g}"


@dataclass(frozen=True)
class EvalNorm(Policy):
    """EvalNorm (Singh and Shrivastava 2019): in evaluation an image counts in its own statistics, as in training.

    Training is BatchNorm's. This policy changes what the network computes in evaluation, on purpose; all else is
    proven to stay.

    Args:
        alpha: weight of the image against the running statistics, from 0 to less than 1. As a rule 1 / (images in a
            training batch).
    """

    alpha: float

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def describe(self) -> str:
        """Return the policy in a few words, for tables."""
        return f"eval norm, alpha={self.alpha:g}"


@dataclass(frozen=True)
class ToGroupNorm(Policy):
    """GroupNorm (Wu and He 2018) in place of BatchNorm: each image is normalized by itself, and by nothing stored.

    For networks that have to follow each image's own statistics. Small batches and privacy engines do not ask for it:
    `Freeze("none")` suits both, and loses nothing. It changes what the network computes, on purpose; how much of the
    pretrained function is left depends on `init`, on the number of groups, and on how much the images are like those it
    was fitted to. `revert` brings the pretrained BatchNorm back. A layer that GroupNorm would return zeros for (one
    channel a group, one position) is frozen instead, and the plan says so.

    Args:
        groups: number of groups; where it does not divide a layer's channels, their greatest common divisor. `auto`:
            1, which is closest to BatchNorm, until `calibrate_group_norm` chooses for each layer.
        channels_per_group: instead of `groups`; 1 is InstanceNorm.
        init: where weight and bias start. `closed_form`: so that an image with the running statistics is mapped as
            before. `sequential`: the same, to be fitted to images, layer by layer, by `calibrate_group_norm` or the
            callback GroupNormCalibration. `copy`: gamma and beta of the BatchNorm, which leaves hardly anything of the
            pretrained function. `reset`: 1 and 0, which leaves nothing.
        eps: what is added to an image's variance v. The share `eps / (v + eps)` of an image's contrast passes, the rest
            is normalized away. `own`: the BatchNorm's, so that next to nothing passes; such a network does not notice
            the size of its weights and images, and is the farthest from the pretrained one. `normalize`: from that up
            to v, so that at most half passes, whichever fits best by `calibrate_group_norm`; until then `own`.
            `center`: 10,000 v. Nothing is normalized any more, an image's mean over the channels of a group is
            subtracted and the rest is a frozen BatchNorm, which `Freeze("none")` has without any loss; nearest to the
            pretrained function, and follows the size of weights and images as that does. `auto`: `normalize`.
    """

    groups: int | Literal["auto"] = "auto"
    channels_per_group: int | None = None
    init: Init = "closed_form"
    eps: float | Eps = "auto"

    def __post_init__(self) -> None:
        check_grouping(self.groups, self.channels_per_group, self.init, self.eps)

    def describe(self) -> str:
        """Return the policy in a few words, for tables."""
        per_group = self.channels_per_group
        groups = f"groups={self.groups}" if per_group is None else f"channels_per_group={per_group}"
        eps = "" if self.eps == "auto" else f", eps={self.eps if isinstance(self.eps, str) else format(self.eps, 'g')}"
        return f"group norm, {groups}, init={self.init}{eps}"


@dataclass(frozen=True)
class Rule:
    """A policy for the layers that meet all of the conditions given.

    Args:
        policy: what happens to them.
        name: pattern for the layer's name, as `layer4.*` or `*.downsample.1`; `*` matches dots as well.
        stage: timm stage, a number of its coarse `group_matcher`: 0 is the stem.
        type: class name of the layer, as `BatchNorm1d` or `BatchNormAct2d`.
    """

    policy: Policy
    name: str | None = None
    stage: int | None = None
    type: str | None = None

    def __post_init__(self) -> None:
        if type(self.policy) not in _BY_NAME.values() or isinstance(self.policy, Rules):
            raise FinetuneBNError(
                complaint("rule.policy", self.policy, "a policy such as Keep() or Freeze(affine='none'), not Rules")
            )
        for field, wanted in (("name", str), ("stage", int), ("type", str)):
            value = getattr(self, field)
            if value is not None and not isinstance(value, wanted):
                raise FinetuneBNError(complaint(f"rule.{field}", value, f"{wanted.__name__}, or None for any"))
        if self.name is None and self.stage is None and self.type is None:
            raise FinetuneBNError(
                complaint("rule", self.policy, "at least one of name, stage, type", "Use name='*' for all layers.")
            )

    def matches(self, names: Sequence[str], kind: str, stage: int | None) -> bool:
        """Tell whether a layer with these names, class name and timm stage meets the conditions."""
        return (
            (self.name is None or any(fnmatch.fnmatchcase(n, self.name) for n in names))
            and (self.type is None or kind == self.type)
            and (self.stage is None or stage == self.stage)
        )

    def describe(self) -> str:
        """Return the conditions as text, for reasons and errors."""
        given = {"name": self.name, "stage": self.stage, "type": self.type}
        return ", ".join(f"{key}={value!r}" for key, value in given.items() if value is not None)


@dataclass(frozen=True)
class Rules(Policy):
    """A list of rules; the first one that matches a layer decides. A layer that none matches is left alone.

    Args:
        rules: `Rule` objects, or pairs (name pattern, policy).
    """

    rules: Sequence[Rule | tuple[str, Policy]]

    def __post_init__(self) -> None:
        if not isinstance(self.rules, Sequence):
            raise FinetuneBNError(complaint("rules", self.rules, "a list of Rules or pairs (name pattern, policy)"))
        rules = []
        for i, rule in enumerate(self.rules):
            if isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str):
                rule = Rule(name=rule[0], policy=rule[1])
            if not isinstance(rule, Rule):
                raise FinetuneBNError(complaint(f"rules[{i}]", rule, "a Rule, or a pair (name pattern, policy)"))
            rules.append(rule)
        if not rules:
            raise FinetuneBNError(complaint("rules", self.rules, "at least one rule", "Use Keep() to do nothing."))
        object.__setattr__(self, "rules", tuple(rules))

    def describe(self) -> str:
        """Return the policy in a few words, for tables."""
        return f"{len(self.rules)} rules"

    def to_dict(self) -> dict[str, Any]:
        """Return the rules as plain data."""
        rules = [rule for rule in self.rules if isinstance(rule, Rule)]
        entries = [{"policy": r.policy.to_dict(), "name": r.name, "stage": r.stage, "type": r.type} for r in rules]
        return {"policy": "Rules", "rules": entries}


_BY_NAME: dict[str, type[Policy]] = {
    p.__name__: p
    for p in (Keep, Freeze, FreezeAffine, NormalizeOnly, ToGroupNorm, Ghost, Renorm, Stochastic, EvalNorm, Rules)
}


CLASSES: tuple[type, ...] = (Policy, Rule, *_BY_NAME.values())

# Pickled under the name that users import: a file that is moved breaks no hyperparameter of a checkpoint. Their
# annotations are looked up here first; whoever asks for them later (the command) would look in that other module.
for _class in CLASSES:
    _hints = typing.get_type_hints(_class)
    _class.__annotations__ = {name: _hints[name] for name in vars(_class).get("__annotations__", {})}
    if _hints:
        vars(_class)["__init__"].__annotations__ = typing.get_type_hints(vars(_class)["__init__"])
    _class.__module__ = "finetune_bn"


def policy_from_dict(data: dict[str, Any]) -> Policy:
    """Return the policy that `to_dict` described.

    Raises:
        FinetuneBNError: no policy of that name, or arguments it does not take.
    """
    name = data.get("policy") if isinstance(data, dict) else data
    if not isinstance(data, dict) or not isinstance(name, str) or name not in _BY_NAME:
        raise FinetuneBNError(complaint("policy", name, f"a dict whose policy is one of {', '.join(_BY_NAME)}"))
    arguments = {k: v for k, v in data.items() if k != "policy"}
    try:
        if name == "Rules":
            policies = [rule["policy"] for rule in arguments["rules"]]
            if any(isinstance(policy, dict) and policy.get("policy") == "Rules" for policy in policies):
                raise FinetuneBNError(complaint("rule.policy", "Rules", "a policy, not rules within rules"))
            arguments["rules"] = [
                Rule(**rule | {"policy": policy_from_dict(policy)})
                for rule, policy in zip(arguments["rules"], policies, strict=True)
            ]
        return _BY_NAME[name](**arguments)
    except (KeyError, TypeError) as error:
        raise FinetuneBNError(complaint("policy", data, f"the arguments of {name}", f"{error}.")) from error


def check_policy(policy: object) -> Policy:
    """Return `policy` if it is one, else raise an error that names those there are."""
    if isinstance(policy, Policy) and type(policy) in _BY_NAME.values():
        return policy
    hint = "Write it with parentheses: an object, not a class." if isinstance(policy, type) else ""
    raise FinetuneBNError(complaint("policy", policy, ", ".join(f"{name}(...)" for name in _BY_NAME), hint))
