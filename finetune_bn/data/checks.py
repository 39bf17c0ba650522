"""Checks of arguments that the data modules share; each failure is one `BadData` that says what to do."""

from __future__ import annotations

import functools

from finetune_bn.errors import BadData, complaint
from finetune_bn.utilities import checks

choice = functools.partial(checks.choice, error=BadData)
choices = functools.partial(checks.choices, error=BadData)


def whole(argument: str, value: object, least: int, other: str = "") -> int:
    """Return `value` if it is a whole number of at least `least`; `other` names what else is allowed."""
    given: int = checks.number(argument, value, least=least, whole=True, other=other, error=BadData)
    return given


def fractions(val_fraction: float, test_fraction: float) -> tuple[float, float]:
    """Return the two shares if each is in [0, 1) and they leave something for training; else raise `BadData`."""
    for argument, share in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        checks.number(argument, share, least=0, below=1, error=BadData)
    if val_fraction + test_fraction >= 1:
        allowed = "two shares with a sum below 1"
        raise BadData(complaint("val_fraction, test_fraction", (val_fraction, test_fraction), allowed))
    return val_fraction, test_fraction
