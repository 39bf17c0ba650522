"""Each check returns the value, or says in one line which argument, what was given and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from finetune_bn.errors import BadData, FinetuneBNError
from finetune_bn.utilities.checks import choice, choices, number


@pytest.mark.parametrize("given", [0, -1, 1.5, 1.0, True, "2", None, math.nan, torch.tensor(1), [1]])
def test_a_whole_number_is_an_integer_within_its_bounds(given: object) -> None:
    assert number("batch_size", 1, least=1, whole=True) == 1
    with pytest.raises(FinetuneBNError, match=r"batch_size: got .*; allowed: a whole number from 1 up\.$"):
        number("batch_size", given, least=1, whole=True)


@pytest.mark.parametrize("given", [np.int64(3), np.int32(3), np.uint8(3)])
def test_numpys_integers_are_taken_and_come_back_plain(given: Any) -> None:
    assert type(number("epoch", given, whole=True)) is int
    assert number("epoch", given, whole=True) == 3


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "allowed"),
    [
        ({"above": 0}, [1e-9, 1, math.inf, np.float32(0.5)], [0, -1.0, math.nan, True, "1"], "a number above 0"),
        ({"least": 0, "below": 1}, [0, 0.5], [1, -1e-9, math.inf], "a number from 0 up, below 1"),
        ({"least": 0, "most": 1}, [0, 1], [1.5, -1], "a number from 0 to 1"),
        ({"above": 0, "most": 1}, [0.5, 1], [0, 1.5], "a number above 0, at most 1"),
        ({}, [-3.5, 0], ["x", None], "a number"),
        ({"least": 1, "none": True}, [None, 1], [0], "a number from 1 up or None"),
    ],
)
def test_a_number_is_within_its_bounds(bounds: Any, good: list[Any], bad: list[Any], allowed: str) -> None:
    for value in good:
        assert number("lr", value, **bounds) == value
    for value in bad:
        with pytest.raises(FinetuneBNError) as caught:
            number("lr", value, **bounds)
        assert str(caught.value) == f"lr: got {value!r}; allowed: {allowed}."


def test_a_choice_is_one_of_the_words_and_the_closest_is_suggested() -> None:
    assert choice("augment", "light", ("none", "light")) == "light"
    with pytest.raises(BadData, match=r"augment: got 'Lihgt'; allowed: none, light\. Did you mean 'light'\?"):
        choice("augment", "Lihgt", ("none", "light"), error=BadData)
    with pytest.raises(FinetuneBNError, match=r"augment: got 3; allowed: none, light\.$"):
        choice("augment", 3, ("none", "light"))


def test_choices_take_none_for_all_and_keep_the_order_given() -> None:
    assert choices("vendors", None, ("a", "b")) == ["a", "b"]
    assert choices("vendors", ["b", "a"], ("a", "b")) == ["b", "a"]


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "one or more of a, b"), (["a", "a"], "each once"), (["c"], "got 'c'"), ("a", r"Write \[a\]")],
)
def test_choices_refuse_empty_repeated_unknown_and_bare_names(given: Any, message: str) -> None:
    with pytest.raises(FinetuneBNError, match=message):
        choices("vendors", given, ("a", "b"))
