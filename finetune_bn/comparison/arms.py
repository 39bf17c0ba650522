"""The treatments that are compared: a policy each, with what belongs to it before, during and after a training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from finetune_bn.conversion.convert import convert
from finetune_bn.conversion.plan import plan
from finetune_bn.conversion.policies import Freeze, Keep, Policy, ToGroupNorm, check_policy
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.group_norm.calibrate import calibrate_group_norm
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.optim.step_limit import limit_steps
from finetune_bn.optim.train_only import train_only
from finetune_bn.recalibration.recalibrate import recalibrate
from finetune_bn.utilities.batches import Forward
from finetune_bn.utilities.checks import choice

CALIBRATE_ON, RECALIBRATE_ON = 256, 512  # images, as in the studies


@dataclass(frozen=True)
class Arm:
    """One treatment.

    Attributes:
        name: how tables call it.
        policy: what happens to the layers before the training.
        what: the treatment in words.
        limit_steps: whether the steps of the optimizer are bounded.
        frozen_fraction: share of the training, at its end, for which live layers are recalibrated and frozen.
        recalibrate: whether the statistics are measured anew behind the training.
        norm_only: whether gamma and beta of the norm layers and the head are trained, and nothing else.
    """

    name: str
    policy: Policy
    what: str
    limit_steps: bool = False
    frozen_fraction: float | None = None
    recalibrate: bool = False
    norm_only: bool = False

    @property
    def calibrate(self) -> bool:
        """Whether layers are fitted to training images before the training."""
        return isinstance(self.policy, ToGroupNorm) and self.policy.init == "sequential"

    def to_dict(self) -> dict[str, Any]:
        """Return the treatment as plain data."""
        return asdict(self) | {"policy": self.policy.to_dict()}


SWITCH_TO = Freeze("none")
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("live", Keep(), "BatchNorm by the batch, as PyTorch has it"),
        Arm("none", Freeze("none"), "frozen statistics, gamma' and beta' constant"),
        Arm("original", Freeze("original"), "frozen statistics, BN's own gamma and beta trained"),
        Arm("limited", Freeze("none"), "frozen as none, steps of the optimizer bounded", limit_steps=True),
        Arm("scheduled", Keep(), "live, recalibrated and frozen for the last 20 %", frozen_fraction=0.2),
        Arm("recalibrated", Keep(), "live, statistics measured anew behind the training", recalibrate=True),
        Arm("group_norm", ToGroupNorm(groups=1, init="sequential"), "GroupNorm, fitted to training images first"),
        Arm("affine", Freeze("original"), "frozen statistics, gamma, beta and the head alone trained", norm_only=True),
    )
}


def checked_arms(arms: Iterable[str | Arm] | Mapping[str, Policy | Arm] | None) -> dict[str, Arm]:
    """Return the treatments by name.

    Args:
        arms: names out of `ARMS`, own treatments as `{name: policy}`, or None for all of `ARMS`.

    Raises:
        FinetuneBNError: there are none, an unknown one, or two of one name.
    """
    if arms is None:
        return dict(ARMS)
    allowed = f"a list of names out of {', '.join(ARMS)}, or own ones as {{name: policy}}"
    if isinstance(arms, str):
        choice("arms", arms, ARMS, f"Write [{arms!r}].")
        raise FinetuneBNError(complaint("arms", arms, allowed, f"Write [{arms!r}]."))
    if isinstance(arms, Policy) or not isinstance(arms, Iterable):
        raise FinetuneBNError(complaint("arms", arms, allowed))
    found: dict[str, Arm] = {}
    for given in arms.items() if isinstance(arms, Mapping) else arms:
        arm = _arm(given, allowed)
        if arm.name in found:
            raise FinetuneBNError(complaint("arms", arm.name, "each name once"))
        found[arm.name] = arm
    if not found:
        raise FinetuneBNError(complaint("arms", arms, allowed))
    return found


def _arm(given: Any, allowed: str) -> Arm:
    if isinstance(given, Arm):
        return given
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str):
        name, policy = given
        if isinstance(policy, Arm):
            return policy
        return Arm(name, check_policy(policy), policy.describe())
    if isinstance(given, str):
        return ARMS[choice("arms", given, ARMS)]
    raise FinetuneBNError(complaint("arms", given, allowed))


def check_layers(part: nn.Module) -> None:
    """Raise where there is no BatchNorm to treat.

    Raises:
        NoBatchNormMatched: the model has none.
    """
    plan(part, Keep(), probe=False)


def treat(model: nn.Module, part: str, arm: Arm, images: Iterable[Any], forward: Forward | None, example: Any) -> None:
    """Do to a model, in place, what an arm does before the training.

    Args:
        model: a copy that may be changed.
        part: attribute path of the part whose layers are treated; "" is the model.
        arm: the treatment.
        images: training images drawn one by one, for layers that are fitted to them.
        forward: how a batch is passed to the part.
        example: an input of the part; None where it is not known.
    """
    target = model.get_submodule(part)
    _put(model, part, convert(target, arm.policy, example_input=example, verify=False))
    target = model.get_submodule(part)
    if arm.calibrate:
        calibrate_group_norm(target, images, max_samples=CALIBRATE_ON, forward=forward, progress=False)
    if arm.norm_only:
        train_only(model, "norm")


def bound_steps(optimizer: torch.optim.Optimizer, model: nn.Module, part: str, arm: Arm, example: Any) -> None:
    """Bound the steps of an optimizer, where an arm asks for it."""
    if arm.limit_steps:
        limit_steps(optimizer, model, example_input=None if part else example)


def switch(model: nn.Module, part: str, images: Iterable[Any], forward: Forward | None) -> None:
    """Recalibrate the live layers of a model in training, and freeze them, as `BatchNormSchedule` does."""
    measure(model, part, images, forward)
    before = {id(p): p for p in model.parameters()}
    _put(model, part, convert(model.get_submodule(part), SWITCH_TO, verify=False))
    after = {id(p) for p in model.parameters()}
    for key in before.keys() - after:
        before[key].grad = None  # without one, optimizers leave a parameter alone, weight decay included
    model.train()


def measure(model: nn.Module, part: str, images: Iterable[Any], forward: Forward | None) -> None:
    """Give the layers the statistics of training images drawn one by one."""
    target = model.get_submodule(part)
    if find_batch_norms(target):
        recalibrate(target, images, max_samples=RECALIBRATE_ON, forward=forward, progress=False)


def applicable(part: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the names of those treatments of `ARMS` whose plan refuses no layer."""
    found = []
    for name in names:
        rows = plan(part, ARMS[name].policy, probe=False).rows
        if not any(row.refused for row in rows):
            found.append(name)
    return found


def _put(model: nn.Module, path: str, changed: nn.Module) -> None:
    """Put a part in place: `convert` returns another module where the part is a BatchNorm itself."""
    if path and model.get_submodule(path) is not changed:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, changed)
