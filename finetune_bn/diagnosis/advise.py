"""`advise`: one recommended treatment for a diagnosis, with its reasons, as a policy and as an overlay for a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_bn.conversion.policies import Policy
from finetune_bn.diagnosis.rule import Arm, Reason
from finetune_bn.utilities.results import Result, Shown


@dataclass(frozen=True)
class Advice(Result):
    """What to do; `print` it, or write `overlay` to a file and pass that as a second `--config`.

    Attributes:
        arm: the treatment, by the name it has in the studies.
        title: the treatment in a few words.
        policy: the policy that `convert` takes.
        lr_factor: what a learning rate for live layers is to be multiplied by.
        lr: a learning rate; None where none was asked about.
        limit_steps: whether the optimizer's steps are to be bounded.
        recalibrate: whether statistics are to be measured anew for evaluation.
        schedule: the share of the training at whose end layers are frozen; None: no schedule.
        reasons: why, each with its number and what it rests on.
        second: the treatment that comes next, and a sentence: what would change the answer.
        overlay: YAML text for `--config`.
        sure: how sure the advice is, a sentence.
    """

    arm: Arm
    title: str
    policy: Policy
    lr_factor: float
    lr: float | None
    limit_steps: bool
    recalibrate: bool
    schedule: float | None
    reasons: tuple[Reason, ...]
    second: tuple[Arm, str]
    overlay: str
    sure: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "arm": self.arm,
            "title": self.title,
            "policy": self.policy.describe(),
            "lr_factor": self.lr_factor,
            "lr": self.lr,
            "limit_steps": self.limit_steps,
            "recalibrate": self.recalibrate,
            "schedule": self.schedule,
            "reasons": [reason.to_dict() for reason in self.reasons],
            "second": {"arm": self.second[0], "what_would_change": self.second[1]},
            "overlay": self.overlay,
            "sure": self.sure,
        }

    def shown(self) -> Shown:
        """Return what is advised, why, what comes second, how sure it is, and the overlay."""
        second = f"Second: {self.second[0]}. {self.second[1]}"
        reasons, notes = [str(reason) for reason in self.reasons], [second, self.sure]
        return Shown(f"Advice: {self.title}", lead=reasons, notes=notes, code=self.overlay)
