"""The largest eigenvalue of a Hessian, against one that is known."""

from __future__ import annotations

import math

import pytest
import torch

from finetune_bn.diagnosis.curvature import adam_scale, lr_bound, top_eigenvalue


def quadratic(values: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a symmetric matrix with these eigenvalues, and a point."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator))[0]
    return basis @ torch.diag(torch.tensor(values)) @ basis.T, torch.randn(len(values), generator=generator)


@pytest.mark.parametrize("values", [[9.0, 4.0, 1.0, 0.5], [3.0, 1.0, -8.0, 0.1]])
def test_it_is_the_largest_also_where_another_one_is_more_negative(values: list[float]) -> None:
    matrix, point = quadratic(values)
    point.requires_grad_()
    found = top_eigenvalue(lambda: 0.5 * point @ matrix @ point, [point], iterations=200, tolerance=1e-7)
    assert found == pytest.approx(max(values), rel=1e-3)


def test_a_direction_that_was_not_found_yet_is_not_taken_for_a_flat_loss() -> None:
    values = torch.cat([torch.tensor([300.0, -400.0]), torch.zeros(3000)])
    point = torch.ones(len(values), requires_grad=True)
    loss = lambda: 0.5 * (values * point**2).sum()  # noqa: E731
    assert top_eigenvalue(loss, [point], iterations=8) == pytest.approx(300.0, rel=0.05)


def test_a_scale_multiplies_the_hessian_on_both_sides() -> None:
    matrix, point = quadratic([9.0, 4.0, 1.0, 0.5])
    point.requires_grad_()
    scale = torch.tensor([1.0, 2.0, 0.5, 3.0])
    expected = torch.linalg.eigvalsh(scale[:, None] * matrix * scale).max()
    found = top_eigenvalue(lambda: 0.5 * point @ matrix @ point, [point], scale=[scale], iterations=200, tolerance=1e-7)
    assert found == pytest.approx(float(expected), rel=1e-3)


def test_what_has_not_settled_in_time_is_no_number_and_a_linear_loss_has_no_curvature() -> None:
    matrix, point = quadratic([1.0, 0.999, 0.998, -0.999])
    point.requires_grad_()
    weights = torch.randn(4)
    assert top_eigenvalue(lambda: (weights * point).sum(), [point]) is None
    shown = top_eigenvalue(lambda: 0.5 * point @ (matrix * 1e3) @ point, [point], tolerance=0.0, until=-math.inf)
    assert shown is not None
    assert math.isnan(shown) or shown > 0


def test_gradient_descent_grows_beyond_the_bound_and_not_below() -> None:
    for momentum in (0.0, 0.9):
        bound = lr_bound(4.0, momentum)
        for factor, grows in ((0.99, False), (1.01, True)):
            x, v = 1.0, 0.0
            for _ in range(3000):
                v = momentum * v + 4.0 * x
                x -= factor * bound * v
            assert (abs(x) > 1.0) is grows
    assert lr_bound(2.0, 0.9, adam=True) == pytest.approx(38.0 / 2.0)
    assert lr_bound(-1.0) == math.inf


def test_adams_scale_is_that_of_its_first_steps() -> None:
    point = torch.tensor([2.0, -0.5], requires_grad=True)
    (scale,) = adam_scale([lambda: (point**2).sum()], [point])
    assert torch.allclose(scale, (2 * point.detach()).abs().rsqrt())
