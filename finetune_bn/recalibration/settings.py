"""How statistics are measured anew, and for how long: the arguments of a recalibration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.checks import choice, number

Mode = Literal["auto", "exact", "one_pass"]
How = Literal["renormalize", "preserve"]
Part = Literal["both", "mean", "var"]


@dataclass(frozen=True)
class RecalibrationSettings:
    """How statistics are measured, and for how long.

    Args:
        mode: exact: all images together, layer by layer, so that it does not matter how they are cut into batches.
            one_pass: each chunk of images is normalized by itself. auto: exact where the activations fit in memory.
        how: renormalize: gamma and beta keep their values and the function changes. preserve: the function stays, and
            gamma and beta are solved anew.
        part: The mean and the variance (both), or one of them.
        prior: Weight of the statistics from before, in images.
        max_samples: How many images are taken at most, over all processes; null takes all.
        min_samples: Fewer images are an error.
        tolerance: Stop when the standard error of all statistics is at most this, in standard deviations.
        batch_size: Images that one_pass normalizes together. Default: as many as fit in memory, 1,024 at most.
        memory: Bytes for activations that wait in mode exact. Default: half of what the device has free.
        keep_batches: true: batches go through the network as they come. false: they are cut and joined. Default: they
            are cut and joined, unless a trial shows that it changes what the layers see, as where the first dimension
            is not images (clips x frames, bags, time first).

    Raises:
        FinetuneBNError: one of them is none of the values allowed.
    """

    mode: Mode = "auto"
    how: How = "renormalize"
    part: Part = "both"
    prior: float = 0
    max_samples: int | None = None
    min_samples: int = 8
    tolerance: float | None = None
    batch_size: int | None = None
    memory: int | None = None
    keep_batches: bool | None = None

    def __post_init__(self) -> None:
        checked = {
            "mode": choice("mode", self.mode, get_args(Mode)),
            "how": choice("how", self.how, get_args(How)),
            "part": choice("part", self.part, get_args(Part)),
            "prior": number("prior", self.prior, least=0, below=math.inf),
            "min_samples": number("min_samples", self.min_samples, least=1, whole=True),
            "tolerance": number("tolerance", self.tolerance, above=0, none=True),
        }
        for name in ("max_samples", "batch_size", "memory"):
            checked[name] = number(name, getattr(self, name), least=1, whole=True, none=True)
        if self.keep_batches is not None and not isinstance(self.keep_batches, bool):
            raise FinetuneBNError(complaint("keep_batches", self.keep_batches, "True, False or None"))
        for name, value in checked.items():
            object.__setattr__(self, name, value)
