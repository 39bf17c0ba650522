"""Balancing: the factors against their objective and a search of all, and that the BatchNorm network never notices."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.errors import BadData, FinetuneBNError, UnsupportedLayer
from finetune_bn.functional.balancing import _LEVELS, _opposing, balancing_factors
from finetune_bn.group_norm.twin import batch_norm_twin
from finetune_bn.layers import GroupNorm
from finetune_bn.layers.balance import absolute_name, multiply_channels, relative_name
from tests.models import build, settle


def means(channels: int, images: int = 200, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return the means of channels in images, [N, C], correlated as those of a convolution are."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=(images, 3)) @ generator.normal(size=(3, channels))
    return (shared + 0.5 * generator.normal(size=(images, channels))) * generator.uniform(0.2, 5, channels)


def objective(m: Any, f: Any, variance: Any, importance: Any, groups: int) -> float:
    """Return the sum over groups of Var(group mean) * sum(importance / size^2), from the formula."""
    total = 0.0
    for part in np.split(np.arange(len(f)), groups):
        size = f[part] ** 2 * variance[part]
        total += np.var(m[:, part] @ f[part]) * np.sum(importance[part] / size)
    return total


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_factors_are_signed_powers_of_two_that_lower_the_objective(groups: int) -> None:
    m = means(16)
    variance, importance = 4 * m.var(0), np.linspace(0.1, 3, 16)
    covariance = torch.from_numpy(np.cov(m.T, bias=True))
    f = balancing_factors(covariance, torch.from_numpy(variance), torch.from_numpy(importance), groups).numpy()
    assert (np.log2(abs(f)) % 1 == 0).all()
    assert objective(m, f, variance, importance, groups) < 0.5 * objective(m, np.ones(16), variance, importance, groups)


def test_channels_get_the_size_of_the_others_and_those_that_hardly_vary_32_times_their_own_at_most() -> None:
    variance = torch.tensor([1.0, 1.0, 1.0, 4.0**-2, 4.0**-10, 0.0]).double()
    found = balancing_factors(torch.diag(variance), variance, torch.ones(6), groups=6)
    assert found.tolist() == [1.0, 1.0, 1.0, 4.0, 32.0, 32.0]
    largest = torch.tensor([1.0, 1.0, 1.0, 4.0**2, 4.0**4]).double()
    assert balancing_factors(torch.diag(largest), largest, torch.ones(5), groups=5).tolist()[:4] == [
        1.0,
        1.0,
        1.0,
        0.25,
    ]


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_how_large_all_channels_are_changes_no_factor(scale: float) -> None:
    m = means(16)
    variance, importance = torch.from_numpy(4 * m.var(0)), torch.from_numpy(np.linspace(0.1, 3, 16))
    covariance = torch.from_numpy(np.cov(m.T, bias=True))
    f = balancing_factors(covariance, variance, importance)
    assert torch.equal(balancing_factors(scale * covariance, scale * variance, importance), f)
    assert f.unique().numel() > 2


def test_a_search_of_all_factors_of_a_small_layer_finds_little_better() -> None:
    ratios = []
    for seed in range(5):
        m = means(4, seed=seed)
        m /= m.std(0)  # so that the common sizes are alike
        variance, importance = m.var(0), np.ones(4)
        covariance = torch.from_numpy(np.cov(m.T, bias=True))
        f = balancing_factors(covariance, torch.ones(4), torch.ones(4)).numpy()
        levels = [sign * size for sign in (-1, 1) for size in _LEVELS]
        best = min(objective(m, np.array(g), variance, importance, 1) for g in itertools.product(levels, repeat=4))
        start = objective(m, np.ones(4), variance, importance, 1)
        ratios.append((objective(m, f, variance, importance, 1) - best) / (start - best))
    assert max(ratios) < 0.2, "of what all factors could gain, at most a fifth is left"


@pytest.mark.parametrize("case", ["dead channel", "all dead", "one channel"])
def test_channels_that_do_not_vary_get_finite_factors(case: str) -> None:
    variance = {"dead channel": [1.0, 0.0, 2.0], "all dead": [0.0] * 3, "one channel": [3.0]}[case]
    v = torch.tensor(variance)
    f = balancing_factors(torch.diag(v), v, torch.zeros(len(v)))
    assert torch.isfinite(f).all()
    assert (f != 0).all()


def test_flipping_either_of_two_channels_is_as_good_and_rounding_does_not_choose() -> None:
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    results = [
        balancing_factors(covariance * (1 + 1e-9 * torch.randn(2, 2, generator=torch.Generator().manual_seed(seed))),
                          torch.ones(2), torch.ones(2))
        for seed in range(10)
    ]  # fmt: skip
    assert all(torch.equal(each, results[0]) for each in results)
    assert results[0].tolist() == [1, -1], "and of two that differ in all signs, the one whose first is positive"


MAPS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 8)),
    "conv2d": (nn.Conv2d(4, 6, 3, bias=False), (2, 4, 8, 8)),
    "conv3d": (nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "linear": (nn.Linear(4, 6), (2, 4)),
}


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_is_multiplied_channel_by_channel_and_back_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, shape = copy.deepcopy(MAPS[kind][0]).to(dtype), MAPS[kind][1]
    x, before = torch.randn(shape).to(dtype), copy.deepcopy(layer.state_dict())
    factors = torch.tensor([1, -2, 0.5, -1, 4, -0.25], dtype=torch.float64)
    y = layer(x)
    multiply_channels(layer, factors)
    expected = y * factors.to(dtype).view([-1] + [1] * (y.dim() - 2))
    torch.testing.assert_close(layer(x), expected, rtol=0 if kind != "transposed" else 1e-5, atol=1e-6)
    multiply_channels(layer, 1 / factors)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("name", "start", "relative"),
    [
        ("conv1", "bn1", "..conv1"),
        ("a.b.conv", "a.b.bn", "..conv"),
        ("a.b.conv", "a.c.bn", "...b.conv"),
        ("conv", "a.b.bn", "....conv"),
        ("a.conv", "bn", "..a.conv"),
    ],
)
def test_names_are_relative_and_hold_within_another_model(name: str, start: str, relative: str) -> None:
    assert relative_name(name, start) == relative
    assert absolute_name(relative, start) == name
    assert absolute_name(relative, f"net.{start}") == f"net.{name}"


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)]
    return settle(nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(12 * 16, 5), nn.BatchNorm1d(5))).eval()


def images(number: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(number, 3, 6, 6, generator=generator)
    return x + 2 * torch.randn(number, 3, 1, 1, generator=generator)


def balanced() -> tuple[nn.Module, nn.Module, Any]:
    """Return the BatchNorm network, the calibrated one, and the record."""
    before = network()
    model = fbn.convert(copy.deepcopy(before), fbn.ToGroupNorm(groups=1), example_input=images(2))
    record = fbn.calibrate_group_norm(model, [images()])
    assert all(m.balance is not None for m in model.modules() if isinstance(m, GroupNorm))
    return before, model, record


def test_balancing_goes_further_than_the_fit_alone() -> None:
    _, _, record = balanced()
    alone = fbn.convert(network(), fbn.ToGroupNorm(groups=1), example_input=images(2))
    other = fbn.calibrate_group_norm(alone, [images()], balance=False)
    assert record.rows[0].error < 0.7 * other.rows[0].error
    assert [row.not_balanced for row in other.rows] == ["not asked for"] * 3
    assert all(m.balance is None for m in alone.modules() if isinstance(m, GroupNorm))


def test_the_batch_norm_network_is_the_same_bit_for_bit() -> None:
    before, model, _ = balanced()
    x = images(4)
    assert torch.equal(batch_norm_twin(model)(x), before(x))
    for layer in (m for m in model.modules() if isinstance(m, GroupNorm)):
        layer.alpha = 1.0
    assert torch.equal(model(x), before(x)), "blended over wholly to BatchNorm, behind the maps as they are now"


@pytest.mark.parametrize("way", ["itself", "copy", "pickle", "file", "within another"])
def test_revert_brings_the_weights_back_bit_for_bit(way: str) -> None:
    before, model, _ = balanced()
    fitted = model(images(4))
    if way == "copy":
        model = copy.deepcopy(model)
    if way == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    if way == "file":
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        model = fbn.convert(network(), fbn.ToGroupNorm(groups=1), example_input=images(2))
        model.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(model(images(4)), fitted)
    if way == "within another":
        fbn.revert(nn.Sequential(nn.Identity(), model), example_input=images(2))
    model = fbn.revert(model) if way != "within another" else model
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())


def test_another_policy_starts_from_the_weights_as_they_were() -> None:
    before, model, _ = balanced()
    model = fbn.convert(model, fbn.Freeze("none"), example_input=images(2))
    torch.testing.assert_close(model(images(4)), before(images(4)))


def test_a_part_without_the_map_in_front_is_refused_and_stays_as_it_was() -> None:
    _, model, _ = balanced()
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedLayer, match="Pass the whole model"):
        fbn.revert(model[3])  # type: ignore[index]
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_calibrating_again_starts_from_what_is_there() -> None:
    before, model, first = balanced()
    second = fbn.calibrate_group_norm(model, [images()])
    assert second.rows[-1].error <= first.rows[-1].error * 1.1
    reverted = fbn.revert(model)
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in reverted.state_dict().items())


def test_an_error_on_the_way_leaves_the_maps_as_they_were() -> None:
    model = fbn.convert(network(), fbn.ToGroupNorm(groups=1), example_input=images(2))
    values = copy.deepcopy(model.state_dict())
    model[0][3].weight.data[0, 0] = float("inf")  # type: ignore[index]
    values["0.3.weight"] = model.state_dict()["0.3.weight"].clone()
    with pytest.raises(BadData, match="layer number 2"):
        fbn.calibrate_group_norm(model, [images()])
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(m.balance is None for m in model.modules() if isinstance(m, GroupNorm))


def test_layers_that_cannot_be_balanced_are_named_with_the_reason() -> None:
    model, x = build("conv_twice")
    model = fbn.convert(model, fbn.ToGroupNorm(groups=1), example_input=x)
    record = fbn.calibrate_group_norm(model, [torch.randn(16, *x.shape[1:])])
    reasons = {row.names[0]: row.not_balanced for row in record.rows if row.not_balanced}
    assert reasons
    for name, why in reasons.items():
        assert name in str(record)
        assert f": {why}" in str(record)


def test_a_map_in_float16_is_left_alone_as_small_values_would_lose_digits() -> None:
    model = fbn.convert(network(), fbn.ToGroupNorm(groups=1), example_input=images(2)).half()
    before = model[0][0].weight.clone()  # type: ignore[index]
    record = fbn.calibrate_group_norm(model, [images().half()])
    assert all("float16" in row.not_balanced for row in record.rows)
    assert torch.equal(model[0][0].weight, before)  # type: ignore[index]


def test_a_wrong_argument_is_one_clear_error() -> None:
    model = fbn.convert(network(), fbn.ToGroupNorm(groups=1), example_input=images(2))
    with pytest.raises(FinetuneBNError, match="balance: got 'yes'"):
        fbn.calibrate_group_norm(model, [images()], balance="yes")  # type: ignore[arg-type]


def test_groups_are_balanced_each_by_itself() -> None:
    m = means(12)
    covariance, variance = torch.from_numpy(np.cov(m.T, bias=True)), torch.from_numpy(m.var(0))
    importance = torch.linspace(0.5, 3, 12, dtype=torch.float64)
    both = balancing_factors(covariance, variance, importance, groups=2)
    for part in (slice(0, 6), slice(6, 12)):
        alone = balancing_factors(covariance[part, part], variance[part], importance[part])
        ratio = both[part] / alone
        assert torch.equal(ratio, ratio[:1].expand(6)), "but for one power of two that all share"


def test_only_ratios_of_importance_count() -> None:
    m = means(12)
    covariance, variance = torch.from_numpy(np.cov(m.T, bias=True)), torch.from_numpy(m.var(0))
    importance = torch.logspace(-3, 0, 12, dtype=torch.float64)
    large, tiny = (balancing_factors(covariance, variance, importance * scale) for scale in (1.0, 2.0**-40))
    assert torch.equal(large, tiny)


def test_opposing_signs_are_each_against_the_sum_of_those_before_it() -> None:
    covariance = torch.from_numpy(np.cov(means(8, seed=3).T, bias=True))
    signs = np.zeros(8)
    for channel in np.argsort(-covariance.diagonal().numpy(), kind="stable"):
        signs[channel] = -1.0 if covariance[channel].numpy() @ signs > 0 else 1.0
    assert _opposing(covariance).tolist() == signs.tolist()
    assert set(signs) == {-1.0, 1.0}
