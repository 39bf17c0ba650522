"""The arguments of a recalibration are checked where they are given, and numbers of numpy are numbers."""

from __future__ import annotations

import dataclasses
import inspect
import math

import numpy
import pytest

import finetune_bn as fbn
from finetune_bn.errors import FinetuneBNError
from finetune_bn.recalibration.settings import RecalibrationSettings


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("mode", "fast", "auto, exact, one_pass"),
        ("mode", ["exact"], "auto, exact, one_pass"),
        ("how", None, "renormalize, preserve"),
        ("part", "all", "both, mean, var"),
        ("prior", -1, "a number from 0 up"),
        ("prior", math.inf, "a number from 0 up"),
        ("max_samples", 0, "a whole number from 1 up or None"),
        ("max_samples", 2.5, "a whole number from 1 up or None"),
        ("max_samples", "many", "a whole number from 1 up or None"),
        ("min_samples", 0, "a whole number from 1 up"),
        ("min_samples", 2.5, "a whole number from 1 up"),
        ("batch_size", True, "a whole number from 1 up or None"),
        ("batch_size", 2.5, "a whole number from 1 up or None"),
        ("memory", "1GB", "a whole number from 1 up or None"),
        ("tolerance", math.nan, "a number above 0 or None"),
        ("keep_batches", 1, "True, False or None"),
    ],
)
def test_settings_out_of_range_are_named_with_what_is_allowed(name: str, value: object, allowed: str) -> None:
    with pytest.raises(FinetuneBNError) as caught:
        RecalibrationSettings(**{name: value})  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{name}: got ")
    assert allowed in str(caught.value)


def test_whole_numbers_of_numpy_are_taken_as_plain_ones() -> None:
    settings = RecalibrationSettings(
        max_samples=numpy.int64(64), batch_size=numpy.int32(4), prior=numpy.float32(2), min_samples=numpy.uint8(3)
    )
    assert (settings.max_samples, settings.batch_size, settings.prior, settings.min_samples) == (64, 4, 2.0, 3)
    assert {type(settings.max_samples), type(settings.batch_size), type(settings.min_samples)} == {int}


def test_what_is_not_said_is_what_the_function_takes_for_it() -> None:
    arguments = inspect.signature(fbn.recalibrate).parameters
    settings = RecalibrationSettings()
    for field in dataclasses.fields(settings):
        assert getattr(settings, field.name) == arguments[field.name].default, field.name
    assert settings.prior == 0  # the statistics are those of the data alone


def test_eight_images_are_asked_for_where_nothing_is_said() -> None:
    assert RecalibrationSettings().min_samples == 8
