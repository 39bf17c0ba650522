"""The errors of this package, and the one form that their messages take."""

from __future__ import annotations


class FinetuneBNError(ValueError):
    """Root of the errors raised here; a `ValueError`, so that callers need not know this package."""


class NoBatchNormMatched(FinetuneBNError):
    """A policy, a rule or `revert` found no layer to work on."""


class UnsupportedLayer(FinetuneBNError):
    """A policy asks of a layer what that layer cannot do; nothing was changed."""


class ConversionMismatch(FinetuneBNError):
    """A conversion that claims the same outputs did not give them; nothing was changed.

    Attributes:
        in_values: whether the outputs are there and differ in value, which rounding alone might explain.
    """

    def __init__(self, message: str, in_values: bool = False) -> None:
        super().__init__(message)
        self.in_values = in_values


class MissingDependency(FinetuneBNError, ImportError):
    """An optional package is needed for this, and is not installed."""


class BadData(FinetuneBNError):
    """A data set, file or image cannot be used."""


def complaint(argument: str, given: object, allowed: str, remedy: str = "") -> str:
    """Return one line that names the argument, what was given, what is allowed and what to do.

    Args:
        argument: name of the argument, as the user wrote it.
        given: the value the user passed; shown by its `repr`, cut at 120 characters.
        allowed: the values that would have been accepted.
        remedy: what to do about it, a sentence.
    """
    shown = repr(given)
    if len(shown) > 120:
        shown = shown[:117] + "..."
    text = f"{argument}: got {shown}; allowed: {allowed}."
    return f"{text} {remedy}" if remedy else text
