"""Standard errors against simulation and theory, and the permutation test under i.i.d. and sorted batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune_bn.errors import FinetuneBNError
from finetune_bn.functional.image_spread import ImageSpread, batch_membership_p_value, standard_error
from finetune_bn.functional.moments import Moments


def draw(n: int, channels: int, positions: int, share: float, generator: torch.Generator) -> Tensor:
    """Images whose means take `share` of the variance of 1."""
    image = torch.randn(n, channels, 1, generator=generator) * share**0.5
    return image + torch.randn(n, channels, positions, generator=generator) * (1 - share) ** 0.5


def spread_of(x: Tensor, cut: int, offset: float = 0.0) -> tuple[ImageSpread, Moments]:
    total = ImageSpread.none(x.shape[1])
    for part in x.split(cut):
        total = total.merge(ImageSpread.of(part, part.mean((0, 2)) + offset))
    return total, Moments.of(x)


@pytest.mark.parametrize("cut", [1, 7, 50])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_the_spread_equals_numpy_for_any_cut_and_pivot(cut: int, offset: float) -> None:
    x = draw(50, 5, 9, 0.4, torch.Generator().manual_seed(0)).double() * 3 + 20
    spread, moments = spread_of(x, cut, offset)
    found = spread.variance_per_image(moments.mean, moments.var())
    assert found is not None
    values = x.numpy()
    mean, var = values.mean((0, 2)), values.var((0, 2))
    of_mean = values.mean(2).var(0, ddof=1) / var
    of_var = ((values - mean[None, :, None]) ** 2).mean(2).var(0, ddof=1) / var**2
    np.testing.assert_allclose(found.numpy(), np.stack([of_mean, of_var]), rtol=1e-8)


def test_the_standard_error_predicts_the_spread_of_repeated_measurements() -> None:
    generator = torch.Generator().manual_seed(1)
    estimates, predicted = [], []
    for _ in range(400):
        x = draw(40, 20, 16, 0.3, generator)
        spread, moments = spread_of(x, 40)
        estimates.append(torch.stack([moments.mean, moments.var().log()]))
        variance = spread.variance_per_image(moments.mean, moments.var())
        assert variance is not None
        predicted.append(standard_error(variance, 40))
    observed = torch.stack(estimates).var(0).mean(1).max().sqrt()
    assert np.mean(predicted) == pytest.approx(float(observed), rel=0.05)


def test_packing_for_other_processes_loses_nothing() -> None:
    spread, moments = spread_of(draw(10, 3, 4, 0.5, torch.Generator().manual_seed(2)), 4)
    again = ImageSpread.unpack(spread.pack())
    assert torch.equal(
        again.variance_per_image(moments.mean, moments.var()), spread.variance_per_image(moments.mean, moments.var())
    )


def test_one_image_tells_nothing_and_a_constant_channel_has_no_error() -> None:
    one = torch.randn(1, 3, 4)
    moments = Moments.of(one)
    assert ImageSpread.of(one, moments.mean).variance_per_image(moments.mean, moments.var()) is None
    constant = torch.full((6, 3, 4), 2.0)
    moments = Moments.of(constant)
    found = ImageSpread.of(constant, moments.mean).variance_per_image(moments.mean, moments.var())
    assert found is not None
    assert not found.any()


def test_p_values_are_uniform_when_batches_are_drawn_at_random() -> None:
    generator = torch.Generator().manual_seed(3)
    batches = torch.arange(10).repeat_interleave(2)
    values = [
        batch_membership_p_value(torch.randn(20, 6, generator=generator), batches, 199, seed) for seed in range(300)
    ]
    grid = np.linspace(0.05, 0.95, 10)
    distance = max(abs(np.mean(np.array(values) <= p) - p) for p in grid)
    assert distance < 1.36 / np.sqrt(300)  # Kolmogorov-Smirnov at 5 %


def test_images_that_resemble_their_batch_are_found_and_channels_without_spread_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(4)
    batches = torch.arange(12).repeat_interleave(2)
    features = torch.randn(12, 8, generator=generator).repeat_interleave(2, 0)
    features = features + 0.5 * torch.randn(24, 8, generator=generator)
    features[:, 0] = 7.0
    assert batch_membership_p_value(features, batches) < 1e-3
    assert batch_membership_p_value(features[torch.randperm(24, generator=generator)], batches) > 0.01


@pytest.mark.parametrize("batches", [[0] * 6, [0, 1, 2, 3, 4, 5]])
def test_one_batch_or_batches_of_one_cannot_be_compared(batches: list[int]) -> None:
    with pytest.raises(FinetuneBNError, match="batch: got"):
        batch_membership_p_value(torch.randn(6, 3), batches)


def test_two_images_are_enough_for_a_spread_and_one_is_not() -> None:
    x = draw(2, 3, 5, 0.4, torch.Generator().manual_seed(0))
    spread, moments = spread_of(x, 2)
    assert spread.variance_per_image(moments.mean, moments.var()) is not None
    one, moments = spread_of(x[:1], 1)
    assert one.variance_per_image(moments.mean, moments.var()) is None


def test_a_channel_far_from_zero_that_only_rounding_moves_counts_as_constant() -> None:
    x = draw(8, 2, 5, 0.4, torch.Generator().manual_seed(0)).double()
    x[:, 1] = 1e4 + 1e-3 * x[:, 1]  # variance 1e-6, below eps of float32 times the square of the mean
    spread, moments = spread_of(x, 8)
    found = spread.variance_per_image(moments.mean, moments.var())
    assert found is not None
    assert (found[:, 0] > 0).all()
    assert (found[:, 1] == 0).all()


def test_two_batches_are_enough_to_tell_whether_they_differ() -> None:
    features = torch.cat([torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) + offset for offset in (0, 5)])
    assert batch_membership_p_value(features, [0] * 8 + [1] * 8, permutations=199) == pytest.approx(1 / 200)
    with pytest.raises(FinetuneBNError, match="images of two batches or more"):
        batch_membership_p_value(features, [0] * 16)
