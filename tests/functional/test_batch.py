"""The tensor maths of layers that normalize by other than the whole batch, against numpy in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune_bn.functional.batch import (
    batch_norm,
    batch_renorm,
    batch_statistics,
    eval_norm,
    ghost_batch_norm,
    image_spread,
    noisy_statistics,
    pooled,
    renorm_statistics,
    stochastic_norm,
    values_per_image,
)
from tests import batch_references as reference
from tests.references import Values, as_array

C = 5
SHAPES = {"1d, no length": (7, C), "1d": (7, C, 4), "2d": (6, C, 4, 3), "3d": (5, C, 2, 3, 2)}
HALF = [torch.bfloat16, torch.float16]


def data(shape: tuple[int, ...] = SHAPES["2d"], seed: int = 0) -> Tensor:
    """Activations whose images and channels differ, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x * 2 + torch.randn(shape[:2] + (1,) * (len(shape) - 2), generator=generator, dtype=torch.float64) + 1


def values(eps: float = 1e-3) -> Values:
    rng = np.random.default_rng(0)
    return Values(rng.uniform(0.3, 1.7, C), rng.normal(size=C), rng.normal(size=C), rng.uniform(0.3, 4, C), eps)


def tensors(v: Values, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    assert v.weight is not None
    assert v.bias is not None
    return {n: torch.from_numpy(a).to(dtype) for n, a in (("weight", v.weight), ("bias", v.bias))}


def running(v: Values, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(v.mean).to(dtype), torch.from_numpy(v.var).to(dtype)


def limits(r_max: float, d_max: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(r_max, dtype=torch.float64), torch.tensor(d_max, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_batch_statistics_are_those_of_numpy_and_never_in_half_precision(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = data(shape).to(dtype).requires_grad_()
    mean, var = batch_statistics(x)
    expected = reference.mean_and_var(as_array(x))
    assert mean.dtype == var.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not mean.requires_grad
    np.testing.assert_allclose(as_array(mean), expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(as_array(var), expected[1], rtol=1e-5)


def test_batch_statistics_do_not_cancel_where_the_mean_is_large() -> None:
    x = data() * 0.01 + 1000
    np.testing.assert_allclose(
        as_array(batch_statistics(x.float())[1]), reference.mean_and_var(as_array(x.float()))[1], rtol=1e-3
    )


def test_batch_statistics_where_there_is_no_kernel_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(torch.Tensor):  # a device without batch_norm_update_stats, as far as can be told
        device = torch.device("meta")  # type: ignore[assignment]

    x = data().float()
    for got, expected in zip(batch_statistics(x.as_subclass(Elsewhere)), batch_statistics(x), strict=True):
        torch.testing.assert_close(got.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_batch_norm_is_torchs_in_training_with_the_statistics_it_stores(shape: tuple[int, ...]) -> None:
    v, x = values(), data(shape)
    y, mean, var = batch_norm(x, **tensors(v), eps=v.eps)
    assert torch.equal(y, F.batch_norm(x, None, None, **tensors(v), training=True, eps=v.eps))
    np.testing.assert_allclose(as_array(mean), reference.mean_and_var(as_array(x))[0])
    np.testing.assert_allclose(as_array(var), reference.unbiased_var(as_array(x)))


# Ghost batches


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 7, 20])
@pytest.mark.parametrize("shape", [(12, C, 3), (13, C, 2, 2), (11, C, 2, 2, 2), (6, C, 4, 3)], ids=str)
def test_each_strided_group_is_normalized_by_its_own_statistics(shape: tuple[int, ...], groups: int) -> None:
    v, x = values(), data(shape)
    y, mean, var = ghost_batch_norm(x, groups, **tensors(v), eps=v.eps)
    np.testing.assert_allclose(as_array(y), reference.ghost(v, as_array(x), groups), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(as_array(mean), reference.mean_and_var(as_array(x))[0], atol=1e-13)
    np.testing.assert_allclose(as_array(var), reference.unbiased_var(as_array(x)))


def test_the_variance_between_groups_counts_which_the_mean_of_variances_leaves_out() -> None:
    """As cifar10-fast, fast-reid and lightly store it: the average of the groups' variances."""
    x = data((8, C, 4))
    x[1::2] += 10
    _, _, var = ghost_batch_norm(x, 2, None, None, 1e-5)
    left_out = torch.stack([x[i::2].transpose(0, 1).flatten(1).var(1) for i in range(2)]).mean(0)
    np.testing.assert_allclose(as_array(var), reference.unbiased_var(as_array(x)))
    assert (var > 3 * left_out).all()


def test_pooled_moments_of_uneven_groups_are_those_of_all_values() -> None:
    parts = [data((n, C, 3), seed=n) for n in (2, 5, 3)]
    means = torch.stack([p.mean((0, 2)) for p in parts])
    variances = torch.stack([p.transpose(0, 1).flatten(1).var(1, correction=0) for p in parts])
    mean, var = pooled(torch.tensor([[6.0], [15.0], [9.0]], dtype=torch.float64), means, variances)
    everything = as_array(torch.cat(parts))
    np.testing.assert_allclose(as_array(mean), reference.mean_and_var(everything)[0])
    np.testing.assert_allclose(as_array(var), reference.unbiased_var(everything))


@pytest.mark.parametrize("groups", [2, 4], ids=["even", "uneven"])
def test_in_a_p_by_k_batch_no_two_images_of_a_label_share_statistics(groups: int) -> None:
    x = data((6, C, 4))
    x.requires_grad_()
    y, _, _ = ghost_batch_norm(x, groups, None, None, 1e-5)
    (gradient,) = torch.autograd.grad(y[0].square().sum(), x)
    reached = {i for i in range(6) if gradient[i].abs().max() > 1e-12}
    assert reached <= set(range(0, 6, groups))


@pytest.mark.parametrize("groups", [2, 4], ids=["even", "uneven"])
def test_ghost_gradients_are_right_to_the_second_order(groups: int) -> None:
    v = values()
    x = data((6, C, 3)).requires_grad_()
    arguments = [t.requires_grad_() for t in tensors(v).values()]

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ghost_batch_norm(x, groups, weight, bias, v.eps)[0]

    assert torch.autograd.gradcheck(run, (x, *arguments))
    assert torch.autograd.gradgradcheck(run, (x, *arguments))


def test_a_group_of_one_value_is_refused_in_torchs_words() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ghost_batch_norm(data((4, C)), 4, None, None, 1e-5)


# Renormalization

LIMITS = {"bn": (1.0, 0.0), "narrow": (1.1, 0.2), "mixed": (1.0, math.inf), "wide": (3.0, 5.0), "inf": (math.inf,) * 2}


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_renorm_is_algorithm_1_with_its_gradients(shape: tuple[int, ...], limit: tuple[float, float]) -> None:
    v, x = values(), data(shape).requires_grad_()
    parameters = {name: t.requires_grad_() for name, t in tensors(v).items()}
    y, mean, var = batch_renorm(
        x, *running(v), **parameters, eps=v.eps, r_max=limits(*limit)[0], d_max=limits(*limit)[1]
    )
    np.testing.assert_allclose(as_array(y), reference.renorm(v, as_array(x), *limit), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(as_array(mean), reference.mean_and_var(as_array(x))[0])
    np.testing.assert_allclose(as_array(var), reference.unbiased_var(as_array(x)))
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected = reference.renorm_gradients(v, as_array(x), as_array(upstream), *limit)
    for name, tensor in {"x": x, **parameters}.items():
        assert tensor.grad is not None
        np.testing.assert_allclose(as_array(tensor.grad), expected[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_without_limits_the_output_is_that_of_evaluation_bit_for_bit(dtype: torch.dtype) -> None:
    v, x = values(), data().to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    parameters, statistics = tensors(v, wide), running(v, wide)
    y, _, _ = batch_renorm(
        x, *statistics, **parameters, eps=v.eps, r_max=limits(math.inf, 0)[0], d_max=limits(1, math.inf)[1]
    )
    assert torch.equal(y, F.batch_norm(x, *statistics, **parameters, training=False, eps=v.eps))


def test_channels_within_the_limits_go_by_the_running_statistics_bit_for_bit_and_the_others_do_not() -> None:
    mean, var = torch.tensor([0.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 50.0])
    running_mean, running_var = torch.tensor([0.1, 0.1, 0.1]), torch.tensor([1.2, 1.2, 1.2])
    by_mean, by_var = renorm_statistics(
        mean, var, running_mean, running_var, 1e-5, torch.tensor(2.0), torch.tensor(1.0)
    )
    assert torch.equal(by_mean == running_mean, torch.tensor([True, False, False]))
    assert torch.equal(by_var == running_var, torch.tensor([True, True, False]))


def test_the_gradient_of_renorm_has_no_part_along_the_mean_or_the_normalized_input_as_a_frozen_layers_has() -> None:
    v, x = values(), data().requires_grad_()
    upstream = torch.randn_like(x)
    r_max, d_max = limits(math.inf, math.inf)
    y, _, _ = batch_renorm(x, *running(v), None, None, v.eps, r_max, d_max)
    frozen = F.batch_norm(x, *running(v), training=False, eps=v.eps)
    centered = x.detach() - x.detach().mean((0, 2, 3), keepdim=True)
    parts = {}
    for name, output in (("renorm", y), ("frozen", frozen)):
        (gradient,) = torch.autograd.grad((output * upstream).sum(), x)
        parts[name] = [gradient.sum((0, 2, 3)).abs().max(), (gradient * centered).sum((0, 2, 3)).abs().max()]
    assert torch.equal(y, frozen)
    assert max(parts["renorm"]) < 0.05  # what eps leaves
    assert min(parts["frozen"]) > 0.5


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_second_derivatives_of_renorm_are_those_of_the_formula_with_r_and_d_constant(
    limit: tuple[float, float],
) -> None:
    v, x = values(), data((6, C, 3)).requires_grad_()
    weight, bias = (t.requires_grad_() for t in tensors(v).values())
    r_max, d_max = limits(*limit)
    mean, var = batch_statistics(x)
    running_mean, running_var = running(v)
    sigma, running_sigma = torch.sqrt(var + v.eps), torch.sqrt(running_var + v.eps)
    r, d = (
        torch.clamp(sigma / running_sigma, 1 / r_max, r_max),
        torch.clamp((mean - running_mean) / running_sigma, -d_max, d_max),
    )
    outputs = (
        batch_renorm(x, running_mean, running_var, weight, bias, v.eps, r_max, d_max)[0],
        F.batch_norm(x, None, None, weight * r, bias + weight * d, True, 0.0, v.eps),
    )
    directions = [torch.randn_like(t) for t in (x, weight, bias)]
    products = []
    for y in outputs:
        first = torch.autograd.grad(y.pow(3).sum(), (x, weight, bias), create_graph=True)
        products.append(
            torch.autograd.grad(sum((g * u).sum() for g, u in zip(first, directions, strict=True)), (x, weight))
        )
    for one, other in zip(*products, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


# Stochastic norm, eval norm


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_stochastic_norm_takes_each_channel_by_the_statistics_it_was_drawn(shape: tuple[int, ...]) -> None:
    v, x = values(), data(shape).requires_grad_()
    by_batch = torch.tensor([True, False, True, True, False])
    y, mean, var = stochastic_norm(x, *running(v), **tensors(v), eps=v.eps, by_batch=by_batch)
    expected = reference.stochastic(v, as_array(x), as_array(by_batch))
    np.testing.assert_allclose(as_array(y), expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(as_array(mean), reference.mean_and_var(as_array(x))[0])
    np.testing.assert_allclose(as_array(var), reference.unbiased_var(as_array(x)))
    y[:, by_batch].sum().backward()  # those do not feel a constant, and the others have no part in it
    assert x.grad is not None
    assert x.grad.abs().max() < 1e-10


def test_stochastic_norm_has_the_gradients_of_either_branch() -> None:
    v, x = values(), data((6, C, 3)).requires_grad_()
    by_batch = torch.tensor([True, False, True, True, False])
    arguments = [t.requires_grad_() for t in tensors(v).values()]
    assert torch.autograd.gradcheck(
        lambda x, w, b: stochastic_norm(x, *running(v), w, b, v.eps, by_batch)[0], (x, *arguments)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.03125, 0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_eval_norm_mixes_the_moments_of_image_and_population(shape: tuple[int, ...], alpha: float) -> None:
    v, x = values(), data(shape)
    y = eval_norm(x, *running(v), **tensors(v), eps=v.eps, alpha=alpha)
    np.testing.assert_allclose(as_array(y), reference.eval_norm(v, as_array(x), alpha), rtol=1e-9, atol=1e-11)
    assert torch.equal(y[2:3], eval_norm(x[2:3], *running(v), **tensors(v), eps=v.eps, alpha=alpha))


def test_eval_norm_comes_closer_than_batch_norm_to_what_an_image_was_normalized_by_in_training() -> None:
    v, errors = values(), {0.0: 0.0, 0.25: 0.0}
    population = data((4000, C, 2), seed=3)
    mean, var = batch_statistics(population)
    for batch in population[:400].split(4):
        trained = batch_norm(batch, None, None, v.eps)[0]
        for alpha in errors:
            errors[alpha] += float((eval_norm(batch, mean, var, None, None, v.eps, alpha) - trained).square().mean())
    assert errors[0.25] < 0.9 * errors[0.0]


def test_eval_norm_has_the_gradients_of_the_formula() -> None:
    v, x = values(), data((3, C, 3)).requires_grad_()
    arguments = [t.requires_grad_() for t in tensors(v).values()]
    assert torch.autograd.gradcheck(lambda x, w, b: eval_norm(x, *running(v), w, b, v.eps, 0.2), (x, *arguments))


# Noise


@pytest.mark.parametrize(
    "shape", [(4000, 2), (4000, 2, 3, 2)], ids=["one value an image", "pixels with much in common"]
)
def test_noise_scatters_as_the_statistics_of_batches_do(shape: tuple[int, ...]) -> None:
    x, images = data(shape, seed=5).repeat(4, *[1] * (len(shape) - 1)), 16
    x = x[torch.randperm(len(x))]
    batches = [batch_statistics(part) for part in x.split(images)]
    means, variances = (torch.stack(t) for t in zip(*batches, strict=True))
    mean, var = batch_statistics(x)
    drawn = [noisy_statistics(mean, var, image_spread(x), images) for _ in range(len(batches))]
    noisy_means, noisy_variances = (torch.stack(t) for t in zip(*drawn, strict=True))
    torch.testing.assert_close(noisy_means.std(0), means.std(0), rtol=0.1, atol=0)
    torch.testing.assert_close(noisy_variances.std(0), variances.std(0), rtol=0.12, atol=0)
    torch.testing.assert_close(noisy_means.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(noisy_variances.mean(0), var, rtol=0.03, atol=0)


def test_image_spread_is_the_variance_over_images_of_their_means_and_relative_of_their_squares() -> None:
    x = data((6, C, 3, 2))
    of_mean, of_square = image_spread(x.requires_grad_())
    array = as_array(x)
    means = array.mean((2, 3))
    squares = ((array - means.mean(0)[None, :, None, None]) ** 2).mean((2, 3))
    np.testing.assert_allclose(as_array(of_mean), means.var(0, ddof=1))
    np.testing.assert_allclose(as_array(of_square), squares.var(0, ddof=1) / squares.mean(0) ** 2)
    assert not of_mean.requires_grad


def test_a_constant_channel_has_no_spread_and_no_noise() -> None:
    spread = image_spread(torch.ones(4, C, 2, 2))
    assert torch.equal(torch.stack(spread), torch.zeros(2, C))
    mean, var = torch.zeros(C), torch.ones(C)
    assert torch.equal(torch.stack(noisy_statistics(mean, var, spread, 8)), torch.stack([mean, var]))


# What all of them keep

V = values()
CASES: dict[str, Any] = {
    "ghost": lambda x, w, s: ghost_batch_norm(x, 2, *w, V.eps)[0],
    "ghost, uneven": lambda x, w, s: ghost_batch_norm(x, 4, *w, V.eps)[0],
    "renorm": lambda x, w, s: batch_renorm(x, *s, *w, V.eps, *limits(1.2, 0.3))[0],
    "stochastic": lambda x, w, s: stochastic_norm(x, *s, *w, V.eps, torch.arange(C) % 2 == 0)[0],
    "eval": lambda x, w, s: eval_norm(x, *s, *w, V.eps, 0.2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("parameters", ["float32", "half"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_activations_stay_so_with_statistics_in_float32(
    case: str, dtype: torch.dtype, parameters: str
) -> None:
    """The output is rounded once: as exact as the dtype allows, also where weights and buffers are half."""
    kept = dtype if parameters == "half" else torch.float32
    x, w, s = data((6, C, 8, 8)).to(dtype), tensors(V, kept).values(), running(V, kept)
    x.requires_grad_()
    y = CASES[case](x, w, s)
    exact = CASES[case](x.detach().double(), [t.double() for t in w], [t.double() for t in s])
    assert y.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=rounding, atol=rounding)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_variances_beyond_float16_stay_finite() -> None:
    """Keras, test_large_value_within_autocast_scope: variance 70,000."""
    x = (torch.randn(8, C, 4, 4) * 300).half()
    s = torch.zeros(C), torch.full((C,), 70_000.0)
    for case in CASES.values():
        assert torch.isfinite(case(x, (None, None), s)).all()
    assert (ghost_batch_norm(x, 2, None, None, 1e-5)[2] > 60_000).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((6, C, 4, 3), torch.channels_last), ((6, C, 2, 3, 2), torch.channels_last_3d)],
    ids=["2d", "3d"],
)
def test_channels_last_stays_channels_last(
    case: str, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    x, w, s = data(shape), list(tensors(V).values()), running(V)
    y = CASES[case](x.to(memory_format=memory_format), w, s)
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y, CASES[case](x, w, s))
    assert CASES[case](x, w, s).is_contiguous()


@pytest.mark.parametrize("case", CASES)
def test_views_that_are_not_contiguous_are_taken_as_they_are(case: str) -> None:
    """cifar10-fast and fast-reid call `view` on the input, which such tensors refuse."""
    whole = data((12, C, 4, 3))
    w, s = list(tensors(V).values()), running(V)
    torch.testing.assert_close(CASES[case](whole[::2], w, s), CASES[case](whole[::2].contiguous(), w, s))
    turned = whole[:6].transpose(2, 3)
    torch.testing.assert_close(CASES[case](turned, w, s), CASES[case](turned.contiguous(), w, s))


@pytest.mark.parametrize("case", CASES)
def test_a_missing_weight_or_bias_counts_as_ones_or_zeros(case: str) -> None:
    x, s = data(), running(V)
    ones, zeros = torch.ones(C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
    expected = CASES[case](x, (ones, zeros), s)
    for w in ((None, None), (ones, None), (None, zeros)):
        torch.testing.assert_close(CASES[case](x, w, s), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["ghost", "ghost, uneven", "renorm", "eval"])
def test_on_a_gpu_outputs_and_gradients_are_those_of_the_cpu(
    case: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    results = []
    for device in ("cpu", "cuda"):
        x = data((6, C, 8, 8)).to(device, dtype, memory_format=memory_format).requires_grad_()
        w, s = tensors(V, torch.float32).values(), running(V, torch.float32)
        y = CASES[case](x, [t.to(device) for t in w], [t.to(device) for t in s])
        assert y.is_contiguous(memory_format=memory_format)
        y.float().pow(3).sum().backward()
        assert x.grad is not None
        results.append((y.detach().cpu().double(), x.grad.cpu().double(), *batch_statistics(x)))
    tolerance = 4 * torch.finfo(dtype).eps + 1e-5
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other.cpu(), one.cpu(), rtol=tolerance, atol=tolerance * float(one.abs().max()))


def test_values_per_image() -> None:
    assert [values_per_image(torch.empty(shape)) for shape in ((2, 3), (2, 3, 4), (2, 3, 4, 5))] == [1, 4, 20]
