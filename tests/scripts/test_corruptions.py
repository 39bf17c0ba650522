"""The corruptions of the shift study: the formulas written down, and what an image may depend on."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from corruptions import SEVERITIES, STRENGTHS, corrupt

INDICES = [3, 11, 12]


@pytest.fixture
def images() -> Tensor:
    x = torch.rand(3, 3, 16, 20, dtype=torch.float64)
    x[0, :, :4], x[0, :, 4:8] = 0.0, 1.0  # the ends of the range are in it
    return x


def kernel(sd: float) -> np.ndarray:
    at = np.arange(-math.ceil(3 * sd), math.ceil(3 * sd) + 1)
    weights = np.exp(-(at**2) / (2 * sd**2))
    return weights / weights.sum()


def reference(x: np.ndarray, kind: str, s: float) -> np.ndarray:
    if kind == "contrast":
        mean = x.mean(axis=(2, 3), keepdims=True)
        return mean + s * (x - mean)
    if kind == "inversion":
        return np.where(x >= s, 1 - x, x)
    if kind == "color":
        return x * np.array([1, 1 - s / 2, 1 - s]).reshape(1, 3, 1, 1)
    weights = kernel(s)
    radius = len(weights) // 2
    padded = np.pad(x, ((0, 0), (0, 0), (radius, radius), (radius, radius)), mode="reflect")
    height, width = x.shape[2:]
    return sum(
        weights[i] * weights[j] * padded[:, :, i : i + height, j : j + width]
        for i in range(len(weights))
        for j in range(len(weights))
    )


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("kind", [kind for kind in STRENGTHS if kind != "noise"])
def test_each_kind_is_its_formula(images: Tensor, kind: str, severity: int) -> None:
    expected = reference(images.numpy(), kind, STRENGTHS[kind][severity - 1])
    np.testing.assert_allclose(corrupt(images, kind, severity, INDICES).numpy(), expected, atol=1e-7)
    assert not np.allclose(expected, images.numpy(), atol=1e-3)


def test_noise_has_the_sd_of_its_severity_and_is_the_same_draw_at_each(images: Tensor) -> None:
    gray = torch.full((4, 3, 64, 64), 0.5, dtype=torch.float64)
    weak, strong = (corrupt(gray, "noise", severity, [1, 2, 3, 4]) - 0.5 for severity in (1, 2))
    assert float(weak.std()) == pytest.approx(STRENGTHS["noise"][0], rel=0.02)
    assert float(weak.mean()) == pytest.approx(0, abs=0.003)
    inside = strong.abs() < 0.5  # where nothing was clipped
    assert inside.double().mean() > 0.999
    torch.testing.assert_close(strong[inside], weak[inside] * (0.12 / 0.08))
    assert abs(float(torch.corrcoef(weak.flatten(1))[0, 1])) < 0.05  # images do not share their noise
    clipped = corrupt(images, "noise", 5, INDICES)
    assert clipped.min() == 0
    assert clipped.max() == 1


@pytest.mark.parametrize("kind", STRENGTHS)
def test_an_image_depends_on_its_index_and_not_on_the_images_beside_it(images: Tensor, kind: str) -> None:
    together = corrupt(images, kind, 4, INDICES)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    alone = corrupt(images[2:], kind, 4, INDICES[2:])
    torch.testing.assert_close(together[2:], alone, rtol=0, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)
    other = corrupt(images[2:], kind, 4, [99])
    assert torch.equal(other, alone) == (kind != "noise")


@pytest.mark.parametrize("kind", STRENGTHS)
def test_images_stay_in_their_range_and_dtype_and_the_input_is_not_written_to(images: Tensor, kind: str) -> None:
    before, x = images.clone(), images.float()
    distances = []
    for severity in SEVERITIES:
        y = corrupt(x, kind, severity, INDICES)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert y.min() >= 0
        assert y.max() <= 1
        distances.append(float((y - x).abs().mean()))
    assert torch.equal(images, before)
    assert torch.equal(x, before.float())
    assert distances == sorted(distances)  # a higher severity moves pixels further


def test_the_strongest_inversion_is_the_negative(images: Tensor) -> None:
    assert torch.equal(corrupt(images, "inversion", 5, INDICES), 1 - images)


@pytest.mark.parametrize("kind", STRENGTHS)
def test_no_image_gives_none(kind: str) -> None:
    assert corrupt(torch.empty(0, 3, 8, 8), kind, 2, []).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "fog"}, "kind is 'fog'; it must be one of noise, blur"),
        ({"severity": 6}, "severity is 6; it must be a whole number from 1 to 5"),
        ({"severity": 0}, "severity is 0"),
        ({"indices": [1]}, "with 1 indices"),
        ({"images": torch.zeros(3, 1, 8, 8)}, r"images are \[3, 1, 8, 8\]"),
        ({"images": torch.randn(3, 3, 8, 8)}, r"images must lie in \[0, 1\]: corrupt them before"),
        ({"images": torch.full((3, 3, 8, 8), float("nan"))}, r"images must lie in \[0, 1\]"),
    ],
)
def test_what_cannot_be_corrupted_is_refused_by_name(images: Tensor, change: dict, match: str) -> None:
    arguments = {"images": images, "kind": "noise", "severity": 1, "indices": INDICES}
    with pytest.raises(ValueError, match=match):
        corrupt(**(arguments | change))
