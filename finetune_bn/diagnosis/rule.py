"""The rule of the advice, in one place: a setting in, the ranked treatments out, each with its reasons.

There is no theory in it. `measured.json` holds the settings of `scripts/study_advice.py` and what each treatment
reached in them; the treatment is advised that lost least in the settings most like the one that is asked about.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal, get_args

from finetune_bn.errors import FinetuneBNError, complaint

Arm = Literal["live", "none", "original", "limited", "scheduled", "recalibrated", "group_norm", "affine"]
ARMS: tuple[Arm, ...] = get_args(Arm)
TITLES: Mapping[Arm, str] = {
    "live": "live layers, as they came",
    "none": "frozen layers",
    "original": "frozen statistics, gamma and beta trained",
    "limited": "frozen layers, the optimizer's steps limited",
    "scheduled": "live layers, recalibrated and frozen for the last fifth of the steps",
    "recalibrated": "live layers, their statistics recalibrated after training",
    "group_norm": "GroupNorm, calibrated",
    "affine": "frozen statistics; gamma, beta and the head are trained, and nothing else",
}
STUDY = "scripts/study_advice.py"

# How far two settings are apart: a doubling of the batch, four times the images and half a standard deviation of shift
# count alike; batches of P labels x K images are another world, and count as four doublings.
PER_DOUBLING, PER_FOURFOLD, PER_SD, PER_SAMPLER = 1.0, 1.0, 2.0, 4.0
# A setting this far away has a third of the say of an equal one.
REACH = 1.0
# All settings together have as much say besides as so many equal ones: the nearest few are measured with errors of a
# point and more. This and `REACH` were chosen on the settings themselves.
PRIOR = 2.0
NAMED = 3  # settings that a reason names


@dataclass(frozen=True)
class Setting:
    """What the rule looks at; None: cannot be told.

    Attributes:
        batch: images that a layer normalizes together in training: those of one device.
        images: training images.
        shift: median over BatchNorm layers of the mean over channels of |mean of the data - stored mean| / stored
            standard deviation.
        iid: whether batches are independent draws.
        images_per_label: images of a label in a batch, where it is there at all.
        log_var: the same median of |log(variance of the data / stored variance)|.
        family: name of the architecture.
    """

    batch: int
    images: int | None = None
    shift: float | None = None
    iid: bool | None = None
    images_per_label: float | None = None
    log_var: float | None = None
    family: str = ""


@dataclass(frozen=True)
class Reason:
    """Why: a sentence, the number in it, and what it rests on."""

    sentence: str
    figure: float | None
    source: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.sentence} [{self.source}]"


@dataclass(frozen=True)
class Measured:
    """One setting of the study, and what every treatment reached there.

    Attributes:
        name: how the study calls it.
        setting: what is known of it before a training.
        scores: mean test accuracy or Recall@1 of each treatment over the reporting seeds, in percent.
        seeds: how many these are.
        rates: best peak learning rate of each treatment, AdamW; empty: not known.
    """

    name: str
    setting: Setting
    scores: Mapping[Arm, float]
    seeds: int
    rates: Mapping[Arm, float] = field(default_factory=dict)

    @property
    def lost(self) -> dict[Arm, float]:
        """Return how many points each treatment is behind the best one."""
        best = max(self.scores.values())
        return {arm: best - score for arm, score in self.scores.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """One treatment in the ranking.

    Attributes:
        arm: which.
        expected_loss: points that it is expected to be behind the best treatment.
        spread: how much that varies between the settings it rests on, a standard deviation.
        reasons: why it stands where it does.
        lr_factor: its best learning rate, as a multiple of that of live layers.
    """

    arm: Arm
    expected_loss: float
    spread: float
    reasons: tuple[Reason, ...]
    lr_factor: float = 1.0


@cache
def shipped() -> tuple[Measured, ...]:
    """Return the measured settings that come with the package."""
    text = resources.files("finetune_bn.diagnosis").joinpath("measured.json").read_text(encoding="utf-8")
    rows = json.loads(text)
    return tuple(Measured(**row | {"setting": Setting(**row["setting"])}) for row in rows)


def distance(a: Setting, b: Setting) -> float:
    """Return how far apart two settings are; what is not known of one of them counts as equal."""
    total = PER_DOUBLING * abs(math.log2(a.batch / b.batch))
    if a.images and b.images:
        total += PER_FOURFOLD * abs(math.log(a.images / b.images, 4))
    if a.shift is not None and b.shift is not None:
        total += PER_SD * abs(a.shift - b.shift)
    if a.iid is not None and b.iid is not None and a.iid != b.iid:
        total += PER_SAMPLER
    return total


def recommend(
    setting: Setting, measured: Sequence[Measured] | None = None, reach: float = REACH, prior: float = PRIOR
) -> tuple[Choice, ...]:
    """Rank the treatments for a setting, the one that is expected to lose least first.

    Its expected loss is the mean over the measured settings of the points it was behind the best one there, each
    weighted by exp(-distance / reach), and by `prior` spread over all of them; the same weights make the learning rate
    that it is to have.

    Args:
        setting: what is known before the training.
        measured: the settings to learn from; None for those that come with the package.
        reach: distance at which a setting has a third of the say of an equal one.
        prior: as how many equal settings all of them together count besides.

    Raises:
        FinetuneBNError: there is no measured setting, or the batch is no positive number.
    """
    rows = shipped() if measured is None else tuple(measured)
    if not rows:
        raise FinetuneBNError(complaint("measured", rows, "one measured setting or more"))
    if setting.batch < 1:
        raise FinetuneBNError(complaint("setting.batch", setting.batch, "a whole number of images from 1 on"))
    near = sorted(rows, key=lambda row: distance(setting, row.setting))
    choices = []
    for arm in ARMS:
        told = [
            (math.exp(-distance(setting, row.setting) / reach) + prior / len(rows), row)
            for row in near
            if arm in row.scores
        ]
        if not told:
            continue
        total = sum(weight for weight, _ in told)
        mean = sum(weight * row.lost[arm] for weight, row in told) / total
        variance = sum(weight * (row.lost[arm] - mean) ** 2 for weight, row in told) / total
        reasons = _reasons(arm, [row for _, row in told])
        choices.append(Choice(arm, mean, math.sqrt(variance), reasons, _lr_factor(arm, told)))
    return tuple(sorted(choices, key=lambda choice: choice.expected_loss))


def _lr_factor(arm: Arm, told: Sequence[tuple[float, Measured]]) -> float:
    """Return the weighted geometric mean of a treatment's best learning rate over that of live layers; 1: not known."""
    known = [(weight, row.rates) for weight, row in told if arm in row.rates and "live" in row.rates]
    if not known:
        return 1.0
    logs = sum(weight * math.log(rates[arm] / rates["live"]) for weight, rates in known)
    return math.exp(logs / sum(weight for weight, _ in known))


def _reasons(arm: Arm, near: Sequence[Measured]) -> tuple[Reason, ...]:
    """Return what the nearest settings say of a treatment, a sentence each."""
    found = []
    for row in near[:NAMED]:
        best = max(row.scores, key=lambda other: row.scores[other])
        rival: Arm = "live" if best == arm else best
        beside = f"{TITLES[rival]} {row.scores[rival]:.1f}"
        found.append(
            Reason(
                f"{TITLES[arm].capitalize()} reached {row.scores[arm]:.1f} %, {beside} % in a setting like yours: "
                f"{row.name}, {row.seeds} seeds.",
                row.lost[arm],
                STUDY,
            )
        )
    return tuple(found)
