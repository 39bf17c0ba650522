"""The divergence of normal distributions: against the integral of its definition, and its properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from finetune_bn.functional.divergence import normal_divergence

EPS = 1e-3


def integral(mean: float, var: float, other_mean: float, other_var: float) -> float:
    """Return the integral of p log(p / q), on a fine grid, in float64."""
    var, other_var = var + EPS, other_var + EPS
    x = np.linspace(mean - 12 * var**0.5, mean + 12 * var**0.5, 200_001)

    def log_density(m: float, v: float) -> np.ndarray:  # type: ignore[type-arg]
        return -((x - m) ** 2) / (2 * v) - 0.5 * np.log(2 * np.pi * v)

    p = np.exp(log_density(mean, var))
    return float(np.sum(p * (log_density(mean, var) - log_density(other_mean, other_var))) * (x[1] - x[0]))


def test_it_is_the_integral_that_defines_it_averaged_over_channels() -> None:
    rng = np.random.default_rng(0)
    mean, other_mean = rng.normal(size=(2, 5))
    var, other_var = rng.uniform(0.1, 4, size=(2, 5))
    expected = np.mean([integral(*four) for four in zip(mean, var, other_mean, other_var, strict=True)])
    found = normal_divergence(*map(torch.from_numpy, (mean, var, other_mean, other_var)), EPS)
    assert float(found) == pytest.approx(expected, rel=1e-8)


def test_it_is_zero_for_the_same_and_positive_for_others_however_small_the_difference() -> None:
    mean, var = torch.randn(7), torch.rand(7)
    assert float(normal_divergence(mean, var, mean, var, EPS)) == 0
    assert float(normal_divergence(mean, var * (1 + 1e-3), mean, var, EPS)) > 0
    constant = normal_divergence(mean, torch.zeros(7), mean, torch.zeros(7), EPS)  # channels that do not vary
    assert float(constant) == 0


def test_shapes_are_broadcast() -> None:
    images, domain = torch.rand(4, 7), torch.rand(7)
    assert normal_divergence(images, images, domain, domain, EPS).shape == (4,)
