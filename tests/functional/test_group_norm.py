"""The maths of GroupNorm in place of BatchNorm against float64 numpy, and what must not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune_bn.functional.frozen import scale_shift
from finetune_bn.functional.group_norm import GroupMoments, ImagePairs, closed_form, contrast_kept, group_norm
from tests import group_references as reference
from tests.references import Values, as_array

SHAPES = {"1d": (12, 8, 1), "sequence": (12, 8, 5), "2d": (12, 8, 3, 4), "3d": (12, 8, 2, 3, 2)}
EPS = 1e-3


def batch_norm(channels: int = 8, affine: bool = True) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Return weight (some negative), bias, mean and variance."""
    generator = torch.Generator().manual_seed(2)
    weight, bias, mean, log_var = torch.randn(4, channels, generator=generator)
    return (weight if affine else None), (bias if affine else None), 3 * mean, log_var.exp()


def values(bn: tuple[Tensor | None, Tensor | None, Tensor, Tensor]) -> Values:
    weight, bias, mean, var = (None if t is None else as_array(t) for t in bn)
    assert mean is not None
    assert var is not None
    return Values(weight, bias, mean, var, EPS)


def images(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return images that differ in mean and contrast, so that GroupNorm has something to remove."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    per_image = [len(x), 1] + [1] * (x.dim() - 2)
    spread = torch.rand(per_image, generator=generator) + 0.5
    return x * spread + torch.randn(per_image, generator=generator) + torch.arange(8.0).view(1, 8, *per_image[2:])


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("affine", [True, False])
def test_closed_form_is_the_formula_of_the_law_of_total_variance(groups: int, affine: bool) -> None:
    bn = batch_norm(affine=affine)
    weight, bias = closed_form(*scale_shift(*bn, EPS), bn[2], bn[3], groups, EPS)
    expected = reference.closed_form(values(bn), groups)
    torch.testing.assert_close(weight.double(), torch.from_numpy(expected[0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.double(), torch.from_numpy(expected[1]), rtol=1e-5, atol=1e-5)


def test_closed_form_is_exact_for_an_image_that_has_the_running_statistics() -> None:
    x = images((1, 8, 40))
    var, mean = torch.var_mean(x, (0, 2), correction=0)
    scale, shift = scale_shift(*batch_norm()[:2], mean, var, EPS)
    for groups in (1, 2, 8):
        y = group_norm(x, groups, *closed_form(scale, shift, mean, var, groups, EPS), EPS)
        torch.testing.assert_close(y, x * scale[:, None] + shift[:, None], rtol=1e-4, atol=1e-4)


def test_closed_form_works_in_float32_for_parameters_in_half_precision() -> None:
    weight, bias, mean, var = (t.half() for t in batch_norm() if t is not None)
    results = closed_form(*scale_shift(weight, bias, mean, var, EPS), mean, var, 2, EPS)
    assert {t.dtype for t in results} == {torch.float32}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_moment_match_and_its_error_are_those_of_numpy(shape: tuple[int, ...], groups: int) -> None:
    bn = batch_norm()
    x = images(shape).double()  # in groups of two single values z is nearly constant, and float32 loses digits
    y = torch.from_numpy(values(bn).output(as_array(x + 0.3 * images(shape, seed=1))))
    assert bn[0] is not None
    assert bn[1] is not None
    pairs = [ImagePairs.of(x[part], y[part], bn[2], bn[1]) for part in (slice(0, 5), slice(5, None))]
    moments = GroupMoments.of_sums(sum(p.sums(bn[2], groups, EPS) for p in pairs), bn[1])  # type: ignore[arg-type]
    weight, bias = moments.match(bn[0])

    z = reference.normalized(as_array(x), groups, EPS)
    expected = reference.moment_match(z, as_array(y), as_array(torch.sign(bn[0])))
    torch.testing.assert_close(weight, torch.from_numpy(expected[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias, torch.from_numpy(expected[1]), rtol=1e-4, atol=1e-4)
    off = reference.error(reference.affine(z, as_array(weight), as_array(bias)), as_array(y))
    assert moments.error(weight, bias) == pytest.approx(off, rel=1e-3)
    other = torch.ones(8), torch.zeros(8)
    off = reference.error(reference.affine(z, *map(as_array, other)), as_array(y))
    assert moments.error(*other) == pytest.approx(off, rel=1e-3)


def test_a_mean_far_from_zero_costs_the_fit_no_digits() -> None:
    """Peers take E[x^2] - E[x]^2 in float32; here deviations are taken from the running mean."""
    x, bn = images((12, 8, 6)), batch_norm()
    y = x * 0.5
    far = x + 1e4
    assert bn[0] is not None
    zeros = torch.zeros(8)
    fits = [
        GroupMoments.of_sums(ImagePairs.of(i, y, pivot, zeros).sums(pivot, 2, EPS), zeros).match(bn[0])
        for i, pivot in ((x, zeros), (far, torch.full((8,), 1e4)))
    ]
    for near, other in zip(*fits, strict=True):
        torch.testing.assert_close(near, other, rtol=1e-2, atol=1e-2)


def test_a_channel_that_is_constant_keeps_its_weight_and_gets_the_mean() -> None:
    x, bias = torch.zeros(9, 4, 3), torch.arange(4.0)
    y = torch.ones(9, 4, 3)
    moments = GroupMoments.of_sums(ImagePairs.of(x, y, torch.zeros(4), bias).sums(torch.zeros(4), 1, EPS), bias)
    weight, offset = moments.match(torch.full((4,), 0.7))
    torch.testing.assert_close(weight, torch.full((4,), 0.7, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(offset, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_group_norm_keeps_dtype_and_memory_format(dtype: torch.dtype) -> None:
    x = images((2, 8, 3, 4)).to(dtype, memory_format=torch.channels_last)
    y = group_norm(x, 2, torch.ones(8), torch.zeros(8), EPS)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    wide = F.group_norm(x.double(), 2, None, None, EPS)
    torch.testing.assert_close(y.double(), wide, rtol=1e-2, atol=1e-2 if dtype.itemsize < 4 else 1e-4)


def test_group_norm_refuses_what_it_would_make_zero() -> None:
    """torch itself refuses it for a single image, and returns zeros for two."""
    assert not F.group_norm(torch.randn(2, 8), 8).any()
    for shape in ((2, 8), (1, 8, 1, 1)):
        with pytest.raises(ValueError, match="single value in each of 8 groups"):
            group_norm(torch.randn(shape), 8, None, None, EPS)


@pytest.mark.parametrize("eps", [1e-5, 0.5, 2.0, 20.0, 1e4])
def test_the_contrast_kept_is_how_the_output_grows_with_an_images_contrast(eps: float) -> None:
    """d log sd(output) / d log contrast, by a difference."""
    x = np.random.default_rng(0).normal(size=1000)
    x = (x - x.mean()) / x.std() * np.sqrt(2.0)

    def size(contrast: float) -> float:
        return float((contrast * x / np.sqrt((contrast * x).var() + eps)).std())

    step = 1e-4
    measured = (np.log(size(1 + step)) - np.log(size(1 - step))) / (np.log1p(step) - np.log1p(-step))
    assert contrast_kept(2.0, eps) == pytest.approx(measured, abs=1e-6)


def test_the_error_is_relative_to_the_spread_and_none_for_a_batch_norm_that_returns_a_constant() -> None:
    x, zeros = images((6, 8, 3, 3)).double(), torch.zeros(8, dtype=torch.float64)

    def moments(y: Tensor) -> GroupMoments:
        return GroupMoments.of_sums(ImagePairs.of(x, y, zeros, zeros).sums(zeros, 2, EPS), zeros)

    ones = torch.ones(8, dtype=torch.float64)
    of_group_norm = moments(F.group_norm(x, 2, eps=EPS))
    assert of_group_norm.error(ones, zeros) < 1e-6
    assert of_group_norm.error(zeros, of_group_norm.y_mean) == pytest.approx(1.0)  # that of a constant
    assert moments(torch.full_like(x, 3.0)).error(ones, zeros) == 0.0
    # Relative: an output a thousand times smaller, with a scale that follows, is as far off.
    y = F.group_norm(x, 2, eps=EPS) + 0.3 * images((6, 8, 3, 3), seed=1).double()
    assert moments(1e-3 * y).error(1e-3 * ones, zeros) == pytest.approx(moments(y).error(ones, zeros), rel=1e-6)
    assert moments(y).error(ones, zeros) > 0.1
