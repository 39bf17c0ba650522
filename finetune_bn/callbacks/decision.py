"""What `policy: auto` has decided: a treatment, its learning rate, and the callbacks that belong to it."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint

from finetune_bn.comparison.arms import ARMS, SWITCH_TO, Arm
from finetune_bn.conversion.policies import Policy, policy_from_dict
from finetune_bn.errors import FinetuneBNError, complaint

# What the treatments consist of beside their policy; given by hand, they would stand beside the decision.
CHOSEN = frozenset({"StepLimit", "BatchNormSchedule", "TrainOnly", "GroupNormCalibration"})
RATE_NAMES = ("lr", "learning_rate")


@dataclass(frozen=True)
class Decision:
    """The treatment that a comparison has chosen.

    Attributes:
        arm: its name.
        policy: its policy, as plain data.
        lr: its learning rate; None where the module has none to set.
        budget: how long was compared: fast, good or best.
        said: the result in a sentence.
    """

    arm: str
    policy: dict[str, Any]
    lr: float | None
    budget: str
    said: str

    @classmethod
    def of(cls, arm: Arm, lr: float | None, budget: str, said: str) -> Decision:
        """Return the decision for an arm."""
        return cls(arm.name, arm.policy.to_dict(), lr, budget, said)

    @classmethod
    def from_dict(cls, data: Any) -> Decision:
        """Return the decision that a checkpoint keeps.

        Raises:
            FinetuneBNError: it is none.
        """
        try:
            decision = cls(**data)
            policy_from_dict(decision.policy)
            known = decision.arm in ARMS and isinstance(decision.lr, float | None)
        except TypeError as error:
            raise FinetuneBNError(complaint("decision", data, "what policy auto keeps in a checkpoint")) from error
        if not known:
            raise FinetuneBNError(complaint("decision", data, "what policy auto keeps in a checkpoint"))
        return decision

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, for a checkpoint."""
        return asdict(self)

    def layers(self) -> Policy:
        """Return the policy."""
        return policy_from_dict(self.policy)

    def parts(self, module: str | None) -> list[dict[str, Any]]:
        """Return the callbacks of the treatment as a config has them.

        Args:
            module: attribute path of the part that is treated.
        """
        arm, inside = ARMS[self.arm], {} if module is None else {"module": module}
        found: list[tuple[str, dict[str, Any]]] = []
        if arm.calibrate:
            found.append(("GroupNormCalibration", inside))
        if arm.norm_only:
            found.append(("TrainOnly", {"what": "norm"}))
        if arm.limit_steps:
            found.append(("StepLimit", {}))
        if arm.frozen_fraction is not None:
            policy = {"class_path": "finetune_bn.Freeze", "init_args": {"affine": SWITCH_TO.affine}}
            found.append(("BatchNormSchedule", {"frozen_fraction": arm.frozen_fraction, "policy": policy, **inside}))
        if arm.recalibrate:
            found.append(("BatchNormRecalibration", {"temporary": True, **inside}))
        return [{"class_path": f"finetune_bn.callbacks.{name}", "init_args": args} for name, args in found]

    def callbacks(self, module: str | None) -> list[Callback]:
        """Return the callbacks of the treatment."""
        made: list[Callback] = []
        for part in self.parts(module):
            arguments = dict(part["init_args"])
            if "policy" in arguments:
                arguments["policy"] = SWITCH_TO
            # Not by an import: their files import the conversion, which asks for this.
            package, _, name = part["class_path"].rpartition(".")
            made.append(getattr(importlib.import_module(package), name)(**arguments))
        return made

    def overlay(self, module: str | None) -> dict[str, Any]:
        """Return what a config says instead of `policy: auto`, as plain data."""
        arguments = {name: value for name, value in self.policy.items() if name != "policy"}
        policy = {"class_path": f"finetune_bn.{self.policy['policy']}", "init_args": arguments}
        found: dict[str, Any] = {"batch_norm": {"policy": policy}}
        if self.lr is not None:
            found["model"] = {"init_args": {"lr": self.lr}}
        if self.parts(module):
            found["trainer"] = {"callbacks+": self.parts(module)}
        return found

    def apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule, module: str | None, *, stage: str) -> None:
        """Give a training the learning rate and the callbacks of the treatment, before its optimizer is made.

        Args:
            trainer: its Trainer.
            pl_module: its module.
            module: attribute path of the part that is treated.
            stage: fit, or what else is going on; elsewhere nothing is added.
        """
        if stage != "fit":
            return
        if self.lr is not None:
            set_rate(pl_module, self.lr)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        there = {type(callback).__name__ for callback in callbacks}
        last = next((i for i, c in enumerate(callbacks) if isinstance(c, Checkpoint)), len(callbacks))
        for callback in self.callbacks(module):
            if type(callback).__name__ in there:
                continue
            callbacks.insert(last, callback)
            last += 1
            callback.setup(trainer, pl_module, stage)


def rate_of(pl_module: pl.LightningModule) -> float | None:
    """Return the learning rate that a module has as an attribute `lr` or `learning_rate`; None where it has none."""
    for name in RATE_NAMES:
        for holder in (vars(pl_module), getattr(pl_module, "hparams", {})):
            value = holder.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                return float(value)
    return None


def set_rate(pl_module: pl.LightningModule, lr: float) -> None:
    """Set the learning rate of a module, as an attribute and as a hyperparameter, as Lightning's Tuner does."""
    for name in RATE_NAMES:
        hyperparameters = getattr(pl_module, "hparams", {})
        if name in vars(pl_module) or name in hyperparameters:
            if name in vars(pl_module):
                setattr(pl_module, name, lr)
            if name in hyperparameters:
                hyperparameters[name] = lr
            return


def check_beside(callbacks: list[Callback]) -> None:
    """Raise where a callback stands beside the decision that is a part of treatments.

    Raises:
        FinetuneBNError: there is one.
    """
    names = [type(callback).__name__ for callback in callbacks]
    beside = [name for name in names if name in CHOSEN]
    beside += [
        "BatchNormRecalibration"
        for callback in callbacks
        if type(callback).__name__ == "BatchNormRecalibration" and getattr(callback, "when", None) != "test"
    ]
    if beside:
        allowed = "a training without them: with policy auto the comparison chooses"
        raise FinetuneBNError(complaint("callbacks", beside, allowed, "Take them out, or name a policy."))
