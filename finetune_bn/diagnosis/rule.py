"""The rule of the advice, in one place: a setting in, the ranked treatments out, each with its reasons."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Arm = Literal["live", "none", "original", "limited", "scheduled", "recalibrated", "group_norm", "affine"]
ARMS: tuple[Arm, ...] = get_args(Arm)


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
class Choice:
    """One treatment in the ranking.

    Attributes:
        arm: which.
        reasons: why it stands where it does.
    """

    arm: Arm
    reasons: tuple[Reason, ...]
