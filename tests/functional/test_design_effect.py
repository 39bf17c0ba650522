"""Design effect and bias of the running variance: theory against simulation, and labels counted in any sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finetune_bn.errors import FinetuneBNError
from finetune_bn.functional.design_effect import Components, LabelCounts, design_effect, group_size
from finetune_bn.metric_learning.pk_sampler import PKBatchSampler

GRID = [(p, k, rho) for p in (4, 8, 16) for k in (1, 2, 4, 8) for rho in (0.0, 0.3, 0.6)]
POSITIONS = 3


def truth(rho: float) -> tuple[float, float, float]:
    """Variances of the effects of labels, images and pixels, with this rho of the images' means."""
    of_means, pixel = 0.8, 0.6
    return rho * of_means, (1 - rho) * of_means - pixel / POSITIONS, pixel


def components(rho: float) -> Components:
    label, image, pixel = (torch.tensor([v], dtype=torch.float64) for v in truth(rho))
    return Components.nested(label, image, pixel, POSITIONS)


def simulate(p: int, k: int, rho: float, batches: int, seed: int = 0) -> Tensor:
    """Return batches of p labels x k images, [batches, p, k, POSITIONS]."""
    label, image, pixel = truth(rho)
    rng = np.random.default_rng(seed)

    def normal(variance: float, *shape: int) -> np.ndarray:
        return variance**0.5 * rng.standard_normal((batches, *shape), dtype=np.float32)

    return torch.from_numpy(normal(label, p, 1, 1) + normal(image, p, k, 1) + normal(pixel, p, k, POSITIONS))


@pytest.mark.parametrize(("p", "k", "rho"), GRID)
def test_deff_and_expected_running_var_are_within_three_percent_of_simulation(p: int, k: int, rho: float) -> None:
    x = simulate(p, k, rho, 800_000 // (p * k) + 20_000)
    images, known = p * k, components(rho)
    batch_means = x.mean((1, 2, 3)).double()
    found_deff = batch_means.var() * images / (known.label + known.image)
    found_var = x.flatten(1).var(1).double().mean()
    assert float(known.rho) == pytest.approx(rho)
    assert float(design_effect(known.rho, k)) == pytest.approx(float(found_deff), rel=0.03)
    assert float(known.expected_running_var(images, POSITIONS, k)) == pytest.approx(float(found_var), rel=0.03)
    assert float(known.variance_of_batch_mean(images, k)) == pytest.approx(float(batch_means.var()), rel=0.03)


@pytest.mark.parametrize(("p", "k", "rho"), [case for case in GRID if case[1] > 1])
def test_components_estimated_from_batches_give_the_same_within_three_percent(p: int, k: int, rho: float) -> None:
    """Each channel of a wide batch stands for a batch of its own: averaged, estimates are as exact as they are many."""
    x = simulate(p, k, rho, 200_000 // (p * k) + 6_000).flatten(1, 2).transpose(0, 1)
    labels = torch.arange(p).repeat_interleave(k)
    found = Components.estimate(x.mean(2), x.var(2, correction=0).mean(0), labels)
    assert found is not None
    pooled = Components(found.label.mean(), found.image.mean(), found.within.mean())
    known = components(rho)
    assert float(design_effect(pooled.rho, k)) == pytest.approx(1 + (k - 1) * rho, rel=0.03)
    expected = float(known.expected_running_var(p * k, POSITIONS, k))
    assert float(pooled.expected_running_var(p * k, POSITIONS, k)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("p", "k", "rho"), [(8, 4, 0.3), (4, 2, 0.6), (16, 1, 0.3)])
def test_the_running_variance_of_a_real_layer_settles_where_it_is_predicted(p: int, k: int, rho: float) -> None:
    layer = nn.BatchNorm1d(2000, momentum=None)
    x = simulate(p, k, rho, 2000 * 20).view(20, 2000, p * k, POSITIONS)
    for batch in x:
        layer(batch.transpose(0, 1))
    assert layer.running_var is not None
    predicted = float(components(rho).expected_running_var(p * k, POSITIONS, k))
    assert float(layer.running_var.mean()) == pytest.approx(predicted, rel=0.03)
    assert float(layer.running_var.mean()) < 0.99 * float(components(rho).variance)  # so the test cannot pass idle


def anova(means: np.ndarray, labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Between-label and within-label variance of one-way analysis of variance, from the textbook."""
    groups = [means[[i for i, label in enumerate(labels) if label == one]] for one in sorted(set(labels))]
    n, total = len(labels), means.mean(0)
    between = sum(len(g) * (g.mean(0) - total) ** 2 for g in groups) / (len(groups) - 1)
    within = sum(((g - g.mean(0)) ** 2).sum(0) for g in groups) / (n - len(groups))
    n0 = (n - sum(len(g) ** 2 for g in groups) / n) / (len(groups) - 1)
    return (between - within) / n0, within


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [5, 1, 1, 1, 9, 5, 3], [0, 0, 0, 0, 7]])
def test_estimates_equal_numpys_for_groups_of_any_size_and_channels_far_from_zero(labels: list[int]) -> None:
    means = torch.randn(len(labels), 5, dtype=torch.float64) + torch.tensor([0.0, 1e4, -3.0, 1.0, 2.0])
    within = torch.rand(5)
    found = Components.estimate(means, within, torch.tensor(labels))
    assert found is not None
    label, image = anova(means.numpy(), labels)
    np.testing.assert_allclose(found.label.numpy(), label, rtol=1e-6)
    np.testing.assert_allclose(found.image.numpy(), image, rtol=1e-6)
    assert torch.equal(found.within, within.double())


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3]])
def test_one_label_or_one_image_of_each_tell_nothing(labels: list[int]) -> None:
    assert Components.estimate(torch.randn(4, 3), torch.ones(3), torch.tensor(labels)) is None


def test_labels_that_are_not_one_an_image_are_an_error() -> None:
    with pytest.raises(FinetuneBNError, match=r"labels: got \(3,\); allowed: one an image: \(4,\)"):
        Components.estimate(torch.randn(4, 3), torch.ones(3), torch.arange(3))


def test_blending_averages() -> None:
    one, two = (Components(*(torch.full((2,), float(v + i)) for i in range(3))) for v in (0, 10))
    half = one.blend(two, 0.5)
    assert [float(part[0]) for part in (half.label, half.image, half.within)] == [5.0, 6.0, 7.0]


@pytest.mark.parametrize(("labels", "expected"), [([0] * 4 + [1] * 4, 4.0), ([0, 1, 2], 1.0), ([0, 0, 0, 1], 2.5)])
def test_group_size_is_k_and_for_unequal_groups_the_sum_of_squares_by_the_sum(
    labels: list[int], expected: float
) -> None:
    assert group_size(torch.tensor(labels)) == pytest.approx(expected)


# Labels counted over batches


def counted(batches: Iterator[Tensor]) -> LabelCounts:
    counts = LabelCounts()
    for batch in batches:
        counts.add(batch)
    return counts


def at_random(labels: int, images: int) -> Iterator[Tensor]:
    return (torch.randint(labels, (images,)) for _ in range(400))


def grouped(labels: int, p: int, k: int) -> Iterator[Tensor]:
    return (torch.randperm(labels)[:p].repeat_interleave(k) for _ in range(400))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: at_random(2, 32), 1.0),
        (lambda: at_random(9, 32), 1.0),
        (lambda: at_random(1000, 32), 1.0),
        (lambda: grouped(1000, 8, 4), 4 * 992 / 999),
        (lambda: grouped(20, 8, 4), 4 * 12 / 19),
        (lambda: grouped(8, 8, 4), 0.0),
        (lambda: (torch.full((16,), i % 50) for i in range(400)), 16.0),
    ],
    ids=["two classes", "nine classes", "many classes", "8 x 4", "8 x 4 of 20", "stratified", "sorted"],
)
def test_group_size_of_counts_is_what_the_sampling_makes_of_the_labels(
    make: Callable[[], Iterator[Tensor]], expected: float
) -> None:
    """Two classes in batches at random are no groups, though 16 images of a batch share a label."""
    found = counted(make()).group_size
    assert found is not None
    assert found == pytest.approx(expected, rel=0.08, abs=0.02)


def test_group_size_of_this_packages_sampler_is_k() -> None:
    labels = torch.arange(300).repeat_interleave(6)
    found = counted(labels[batch] for batch in PKBatchSampler(labels, 8, 4, seed=0)).group_size
    assert found == pytest.approx(4 * 292 / 299, rel=0.02)


def test_the_variance_of_batch_means_from_few_labels_is_what_counts_predict() -> None:
    """5 labels out of 12, 4 images each: neither many labels nor all of them."""
    effects, draws = torch.randn(12, 300, dtype=torch.float64), list(grouped(12, 5, 4)) * 5
    counts = counted(iter(draws))
    means = torch.stack([(effects[batch] + 0.5 * torch.randn(20, 300)).mean(0) for batch in draws])
    assert counts.group_size is not None
    population = Components(effects.var(0).mean(), torch.tensor(0.25), torch.tensor(0.0)).among(counts.diversity)
    predicted = population.variance_of_batch_mean(20, counts.group_size)
    assert float(means.var(0).mean()) == pytest.approx(float(predicted), rel=0.05)


def test_a_smaller_last_batch_does_not_look_like_groups() -> None:
    """Counts of images would vary with the size of the batch; shares do not."""
    found = counted(batch[:5] if i % 8 == 7 else batch for i, batch in enumerate(at_random(9, 32))).group_size
    assert found == pytest.approx(1.0, rel=0.15)


def test_two_batches_of_two_labels_are_enough_to_tell_groups() -> None:
    assert counted(torch.tensor(batch) for batch in ([0, 0], [1, 1])).group_size == pytest.approx(2.0)  # K = 2
    assert counted(torch.tensor(batch) for batch in ([0, 1], [1, 0])).group_size == pytest.approx(0.0)  # stratified


@pytest.mark.parametrize("batches", [[], [[0, 1, 1]], [[3, 3], [3, 3]]], ids=["none", "one", "one label"])
def test_too_few_batches_or_labels_have_no_group_size(batches: list[list[int]]) -> None:
    assert counted(torch.tensor(batch) for batch in batches).group_size is None


def test_two_batches_tell_how_diverse_labels_are() -> None:
    counts = LabelCounts()
    counts.add(torch.tensor([0, 0, 1, 1]))
    assert counts.diversity == 1.0  # of one batch nothing is known
    counts.add(torch.tensor([1, 1, 0, 0]))
    assert counts.diversity == pytest.approx(0.5)  # two labels, as often each
