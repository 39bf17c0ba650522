"""`advise`: one recommended treatment for a diagnosis, with its reasons, as a policy and as an overlay for a config."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_bn.conversion.policies import Freeze, Keep, Policy, ToGroupNorm
from finetune_bn.diagnosis.overrules import LIVE, mend_first, overrules, setting_of
from finetune_bn.diagnosis.remedies import EVIDENCE
from finetune_bn.diagnosis.results import Diagnosis
from finetune_bn.diagnosis.rule import STUDY, TITLES, Arm, Choice, Reason, Setting, recommend
from finetune_bn.utilities.results import Result, Shown


@dataclass(frozen=True)
class Treatment:
    """How an arm of the studies is carried out.

    Attributes:
        policy: what `convert` takes.
        config: the same for a config.
        callback: what the Trainer gets besides, for a config; empty: nothing.
    """

    policy: Policy
    config: str
    callback: str = ""


_AFFINE = "{ class_path: Freeze, init_args: { affine: %s } }"
TREATMENTS: Mapping[Arm, Treatment] = {
    "live": Treatment(Keep(), "{ class_path: Keep }"),
    "none": Treatment(Freeze("none"), _AFFINE % "none"),
    "original": Treatment(Freeze("original"), _AFFINE % "original"),
    "limited": Treatment(Freeze("none"), _AFFINE % "none", "class_path: StepLimit\ninit_args: { ratio: 5.0e-4 }"),
    "scheduled": Treatment(
        Keep(),
        "{ class_path: Keep }",
        "class_path: BatchNormSchedule\n"
        "init_args: { frozen_fraction: 0.2, policy: { class_path: Freeze, init_args: { affine: none } } }",
    ),
    "recalibrated": Treatment(
        Keep(),
        "{ class_path: Keep }",
        "class_path: BatchNormRecalibration\ninit_args: { temporary: true, max_samples: 4096 }",
    ),
    "group_norm": Treatment(
        ToGroupNorm(groups=1),
        "{ class_path: ToGroupNorm, init_args: { groups: 1, init: sequential } }",
        "class_path: GroupNormCalibration",
    ),
    "affine": Treatment(Freeze("original"), _AFFINE % "original", "class_path: TrainOnly\ninit_args: { what: norm }"),
}
_FROZEN_FRACTION = 0.2
# What is tried when it is asked what would change the answer.
_BATCHES = (2, 4, 8, 16, 32, 64, 128, 256)
_IMAGES = (100, 400, 1600, 6400)


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
        second = f"Second: {TITLES[self.second[0]]}. {self.second[1]}"
        reasons, notes = [f"- {reason}" for reason in self.reasons], [second, self.sure]
        return Shown(f"Advice: {self.title}", lead=reasons, notes=notes, code=self.overlay)


def advise(diagnosis: Diagnosis) -> Advice:
    """Return what to do with the BatchNorm layers of a model that was diagnosed.

    The ranking is that of `recommend`: what lost least in the measured settings most like this one. What the diagnosis
    rules out (one value a channel) is left out of it, and what it asks for first (a wrong normalization of the images)
    stands in front of the reasons.

    Args:
        diagnosis: what `diagnose` returned.
    """
    if not diagnosis.layers:
        return _nothing_to_treat()
    setting, out = setting_of(diagnosis), overrules(diagnosis)
    ranked = recommend(setting)
    best, second = [choice for choice in ranked if choice.arm not in out][:2]
    treatment = TREATMENTS[best.arm]
    lr = _rate(diagnosis, best, ranked)
    reasons = [*mend_first(diagnosis), *dict.fromkeys(out.values()), *best.reasons, *_evidence(best, setting)]
    return Advice(
        arm=best.arm,
        title=TITLES[best.arm],
        policy=treatment.policy,
        lr_factor=best.lr_factor,
        lr=lr,
        limit_steps=best.arm == "limited",
        recalibrate=best.arm in ("recalibrated", "scheduled"),
        schedule=_FROZEN_FRACTION if best.arm == "scheduled" else None,
        reasons=tuple(reasons),
        second=(second.arm, _what_would_change(setting, best.arm, set(out))),
        overlay=overlay(best.arm, lr),
        sure=_how_sure(best, second),
    )


def _nothing_to_treat() -> Advice:
    reason = Reason("The model has no BatchNorm layer: there is nothing to treat.", 0.0, "diagnosis")
    return Advice(
        arm="live",
        title="nothing: the model has no BatchNorm layer",
        policy=Keep(),
        lr_factor=1.0,
        lr=None,
        limit_steps=False,
        recalibrate=False,
        schedule=None,
        reasons=(reason,),
        second=("live", "A backbone with BatchNorm layers would."),
        overlay="",
        sure="That is certain.",
    )


def _rate(diagnosis: Diagnosis, best: Choice, ranked: Sequence[Choice]) -> float | None:
    """Return the learning rate that the one asked about becomes, from that of its layers to that of the treatment."""
    asked = None if diagnosis.curvature is None else diagnosis.curvature.lr
    if asked is None:
        return None
    frozen_now = not any(layer.by_batch for layer in diagnosis.layers)
    of_frozen = next((choice.lr_factor for choice in ranked if choice.arm == "none"), 1.0)
    of_live = asked / of_frozen if frozen_now else asked
    return float(f"{of_live * best.lr_factor:.2g}")


def _evidence(choice: Choice, setting: Setting) -> Iterator[Reason]:
    """Yield what the study says of its learning rate, and other studies of itself."""
    arm = choice.arm
    if choice.lr_factor != 1:
        times = f"{choice.lr_factor:.2g} times that of live layers"
        yield Reason(f"Its best learning rate was {times} in settings like yours.", choice.lr_factor, STUDY)
    if arm not in LIVE:
        if setting.iid is False and (setting.images_per_label or 0) > 1:
            yield EVIDENCE["P x K"]
            yield EVIDENCE["ghost"]
            yield EVIDENCE["recalibrated first"]
        elif setting.batch <= 8:
            yield EVIDENCE["batch 2" if setting.batch <= 2 else "batch 4"]
        if arm in ("none", "original"):
            yield EVIDENCE["rate"]
        if arm == "limited":
            yield EVIDENCE["limited"]
    elif setting.batch >= 16:
        yield EVIDENCE["batch 16"]


def _what_would_change(setting: Setting, arm: Arm, out: set[Arm]) -> str:
    """Return the nearest change of the setting that would change the answer, in a sentence."""

    def first_of(changed: Setting) -> Arm:
        return next(choice.arm for choice in recommend(changed) if choice.arm not in out)

    def nearest(values: tuple[int, ...], now: int, name: str) -> tuple[int, Arm] | None:
        by_ratio = sorted(values, key=lambda value: max(value / now, now / value))
        tried = ((value, first_of(_changed(setting, name, value))) for value in by_ratio)
        return next(((value, other) for value, other in tried if other != arm), None)

    said = []
    if (found := nearest(_BATCHES, setting.batch, "batch")) is not None:
        said.append(f"with batches of {found[0]} images it would be {TITLES[found[1]]}")
    if setting.images and (found := nearest(_IMAGES, setting.images, "images")) is not None:
        said.append(f"with {found[0]} training images, {TITLES[found[1]]}")
    if setting.iid is not None and (other := first_of(replace(setting, iid=not setting.iid))) != arm:
        kind = "that are no independent draws" if setting.iid else "drawn one by one"
        said.append(f"with batches {kind}, {TITLES[other]}")
    if not said:
        return f"No batch from {_BATCHES[0]} to {_BATCHES[-1]} and no number of images that was tried changes it."
    return f"What would change the answer: {'; '.join(said)}."


def _changed(setting: Setting, name: str, value: int) -> Setting:
    return replace(setting, batch=value) if name == "batch" else replace(setting, images=value)


def _how_sure(best: Choice, second: Choice) -> str:
    behind = second.expected_loss - best.expected_loss
    sure = "Sure" if behind > 2 * max(best.spread, 1.0) else "Fairly sure" if behind > 1 else "Not sure"
    return (
        f"{sure}: it is expected to be {best.expected_loss:.1f} points behind the best treatment (spread over the "
        f"measured settings {best.spread:.1f}), the second {second.expected_loss:.1f}. Those are small networks on "
        "small pictures: compare measures it on yours."
    )


def overlay(arm: Arm, lr: float | None) -> str:
    """Return YAML text that carries a treatment out, for one more `--config`.

    Args:
        arm: the treatment.
        lr: the learning rate of the model; None leaves that of the config.
    """
    treatment = TREATMENTS[arm]
    head = "\n".join(f"# {line}" for line in textwrap.wrap(f"Advised by finetune-bn diagnose: {TITLES[arm]}.", 110))
    parts = [head, f"batch_norm:\n  policy: {treatment.config}"]
    if lr is not None:
        parts.append(f"model:\n  init_args: {{ lr: {_number(lr)} }}")
    if treatment.callback:
        parts.append(f"trainer:\n  callbacks+:\n{textwrap.indent(treatment.callback, '    ')}")
    return "\n".join(parts) + "\n"


def _number(value: float) -> str:
    """Return a number as YAML reads one: 1e-05 without a point is a string to it."""
    text = f"{value:.2e}"
    mantissa, _, exponent = text.partition("e")
    return f"{float(mantissa):g}".rstrip() + ("" if "." in f"{float(mantissa):g}" else ".0") + f"e{int(exponent):+03d}"
