"""Checks of arguments that the data modules share; each failure is one `BadData` that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from finetune_bn.errors import BadData, complaint


def one_of(argument: str, given: object, allowed: Iterable[str], remedy: str = "") -> str:
    """Return `given` if it is one of `allowed`; else raise `BadData` that lists them and names the closest."""
    choices = list(allowed)
    if isinstance(given, str) and given in choices:
        return given
    near = _closest(given, choices)
    hint = f"Did you mean {near!r}? {remedy}" if near else remedy
    raise BadData(complaint(argument, given, ", ".join(choices), hint.strip()))


def _closest(given: object, choices: list[str]) -> str | None:
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(str(given).lower(), by_lower, n=1)
    return by_lower[found[0]] if found else None


def some_of(argument: str, given: Sequence[str] | None, allowed: Sequence[str]) -> list[str]:
    """Return `given` as a list (`None` = all of `allowed`); empty, repeated or unknown entries raise `BadData`."""
    if given is None:
        return list(allowed)
    if isinstance(given, str):
        raise BadData(complaint(argument, given, "a list of names", f"Write [{given}]."))
    names = [one_of(argument, name, allowed) for name in given]
    if not names or len(set(names)) < len(names):
        raise BadData(complaint(argument, list(given), f"one or more of {', '.join(allowed)}, each once"))
    return names


def at_least(argument: str, given: object, lowest: int, other: str = "") -> int:
    """Return `given` if it is an integer of at least `lowest`; else raise `BadData`, which also names `other`."""
    if isinstance(given, bool) or not isinstance(given, int) or given < lowest:
        raise BadData(complaint(argument, given, f"an integer of at least {lowest}{other}"))
    return given


def fractions(val_fraction: float, test_fraction: float) -> tuple[float, float]:
    """Return the two shares if each is in [0, 1) and they leave something for training; else raise `BadData`."""
    for argument, share in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= share < 1:
            raise BadData(complaint(argument, share, "a number of at least 0 and below 1"))
    if val_fraction + test_fraction >= 1:
        allowed = "two shares with a sum below 1"
        raise BadData(complaint("val_fraction, test_fraction", (val_fraction, test_fraction), allowed))
    return val_fraction, test_fraction
