"""When a recalibration may happen in a Trainer, and what does not go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, WeightAveraging

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.checks import choice, number

When = Literal["validation", "steps", "fit_start", "test"]


def check_timing(when: When, every_n_epochs: int, every_n_steps: int | None, temporary: bool) -> None:
    """Raise unless these say when a recalibration is to happen.

    Raises:
        FinetuneBNError: one is none of the values allowed, or two do not go together.
    """
    choice("when", when, get_args(When))
    number("every_n_epochs", every_n_epochs, least=1, whole=True)
    number("every_n_steps", every_n_steps, least=1, whole=True, none=True)
    if (when == "steps") != (every_n_steps is not None):
        raise FinetuneBNError(complaint("every_n_steps", every_n_steps, "a number with when=steps, and only then"))
    if temporary and when in ("fit_start", "test"):
        remedy = "test always gives the network its own statistics back." if when == "test" else ""
        raise FinetuneBNError(complaint("temporary", True, f"false with when={when}", remedy))


def check_test(when: When, data: Any, per_domain: bool, source_first: bool | None, how: str) -> None:
    """Raise where what is meant for a test is asked for at another time, or the reverse.

    Raises:
        FinetuneBNError: it is.
    """
    if per_domain and (when != "test" or data is not None):
        raise FinetuneBNError(complaint("per_domain", True, "true with when=test and without data"))
    if source_first and (when != "test" or data is not None):
        remedy = "In training use how=preserve."
        raise FinetuneBNError(complaint("source_first", True, "true with when=test and without data", remedy))
    if when == "test" and how == "preserve":
        remedy = "Preserving the function changes nothing in a test."
        raise FinetuneBNError(complaint("how", how, "renormalize with when=test", remedy))


def check_averaging(trainer: pl.Trainer, callback: Callback, when: When, temporary: bool) -> None:
    """Raise where a recalibration beside WeightAveraging would not reach the averaged network.

    Raises:
        FinetuneBNError: it would not; with the way out.
    """
    if when not in ("validation", "steps"):
        return
    if when == "steps" or temporary:
        name, value = ("when", when) if when == "steps" else ("temporary", True)
        allowed = "validation" if name == "when" else "false"
        why = "The averaged network is in place in validations only, and training never sees it."
        raise FinetuneBNError(complaint(name, value, f"{allowed}, beside WeightAveraging", why))
    callbacks: Sequence[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(c, WeightAveraging) for c in callbacks[callbacks.index(callback) :]):
        given = [type(c).__name__ for c in callbacks]
        why = "It puts the averaged network in place, which is the one to recalibrate."
        raise FinetuneBNError(complaint("callbacks", given, "BatchNormRecalibration behind WeightAveraging", why))
