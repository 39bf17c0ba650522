"""Checks of arguments, each of which returns the value or raises one line: argument, value, what is allowed."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

from finetune_bn.errors import FinetuneBNError, complaint


def number(
    argument: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    whole: bool = False,
    none: bool = False,
    other: str = "",
    error: type[FinetuneBNError] = FinetuneBNError,
) -> Any:
    """Return `value` as a plain `int` or `float` if it is a number within the bounds; numpy's numbers are numbers too.

    Args:
        argument: name of the argument, as the user wrote it.
        value: what was given.
        least: the smallest value allowed; None for no such bound.
        above: a bound that the value must exceed.
        below: a bound that the value must stay under.
        most: the largest value allowed.
        whole: whether it must be a whole number.
        none: whether None is allowed, which is then returned.
        other: what else the caller allows, for the message: " or 'auto'".
        error: the class of error to raise.

    Raises:
        FinetuneBNError: it is no number, not finite (but for infinity where no bound forbids it), or out of bounds.
    """
    if value is None and none:
        return None
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, kind) and not isinstance(value, bool):
        plain = int(value) if isinstance(value, numbers.Integral) else float(value)
        if (
            not math.isnan(plain)
            and (least is None or plain >= least)
            and (above is None or plain > above)
            and (below is None or plain < below)
            and (most is None or plain <= most)
        ):
            return plain
    bounds = []
    if least is not None:
        bounds.append(f"from {least:g} up" if most is None else f"from {least:g} to {most:g}")
    if above is not None:
        bounds.append(f"above {above:g}")
    if below is not None:
        bounds.append(f"below {below:g}")
    if most is not None and least is None:
        bounds.append(f"at most {most:g}")
    allowed = ("a whole number " if whole else "a number ") + ", ".join(bounds)
    raise error(complaint(argument, value, allowed.strip() + other + (" or None" if none else "")))


def choice(
    argument: str,
    value: Any,
    allowed: Iterable[str],
    remedy: str = "",
    error: type[FinetuneBNError] = FinetuneBNError,
) -> str:
    """Return `value` if it is one of the words; else raise an error that lists them and names the closest."""
    choices = list(allowed)
    if isinstance(value, str) and value in choices:
        return value
    by_lower = {word.lower(): word for word in choices}
    near = difflib.get_close_matches(str(value).lower(), by_lower, n=1)
    hint = f"Did you mean {by_lower[near[0]]!r}? {remedy}" if near else remedy
    raise error(complaint(argument, value, ", ".join(choices), hint.strip()))


def choices(
    argument: str,
    value: Sequence[str] | None,
    allowed: Sequence[str],
    error: type[FinetuneBNError] = FinetuneBNError,
) -> list[str]:
    """Return `value` as a list (None = all of `allowed`); empty, repeated or unknown words raise."""
    if value is None:
        return list(allowed)
    if isinstance(value, str):
        raise error(complaint(argument, value, "a list of names", f"Write [{value}]."))
    names = [choice(argument, name, allowed, error=error) for name in value]
    if not names or len(set(names)) < len(names):
        raise error(complaint(argument, list(value), f"one or more of {', '.join(allowed)}, each once"))
    return names
