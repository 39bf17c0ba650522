from __future__ import annotations

import pytest

from finetune_bn.data.checks import at_least, fractions, one_of, some_of
from finetune_bn.errors import BadData


def test_one_of_returns_what_is_allowed_and_suggests_what_is_close() -> None:
    assert one_of("augment", "light", ("none", "light")) == "light"
    with pytest.raises(BadData, match=r"augment: got 'Lihgt'; allowed: none, light\. Did you mean 'light'\?"):
        one_of("augment", "Lihgt", ("none", "light"))
    with pytest.raises(BadData, match=r"augment: got 3; allowed: none, light\.$"):
        one_of("augment", 3, ("none", "light"))


def test_some_of_takes_none_for_all_and_keeps_the_order_given() -> None:
    assert some_of("vendors", None, ("a", "b")) == ["a", "b"]
    assert some_of("vendors", ["b", "a"], ("a", "b")) == ["b", "a"]


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "one or more of a, b"), (["a", "a"], "each once"), (["c"], "got 'c'"), ("a", r"Write \[a\]")],
)
def test_some_of_refuses_empty_repeated_unknown_and_bare_names(given: list[str], message: str) -> None:
    with pytest.raises(BadData, match=message):
        some_of("vendors", given, ("a", "b"))


@pytest.mark.parametrize("given", [0, -1, 1.5, True, "2", None])
def test_at_least_refuses_what_is_no_integer_or_too_small(given: object) -> None:
    assert at_least("batch_size", 1, 1) == 1
    with pytest.raises(BadData, match=r"batch_size: got .*; allowed: an integer of at least 1"):
        at_least("batch_size", given, 1)


@pytest.mark.parametrize("shares", [(-0.1, 0.2), (1.0, 0.0), (0.5, 0.5), (float("nan"), 0.1)])
def test_fractions_must_leave_something_for_training(shares: tuple[float, float]) -> None:
    assert fractions(0.1, 0.0) == (0.1, 0.0)
    with pytest.raises(BadData, match="fraction"):
        fractions(*shares)
