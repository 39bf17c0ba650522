"""Batch renormalization from pretrained statistics: its output, its gradient, its schedule, and where that is kept."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from finetune_bn.errors import FinetuneBNError
from finetune_bn.layers import BatchRenorm1d, BatchRenorm2d, FrozenBatchNorm2d
from tests import batch_references as reference
from tests.models import settle
from tests.references import as_array, values_of

C, INF = 4, math.inf


def images(n: int = 6) -> Tensor:
    return torch.randn((n, C, 3, 3), generator=torch.Generator().manual_seed(2)) * 2 + 1


def pretrained(**arguments: Any) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(C, **arguments)
    settle(bn)
    return bn


def renorm(**arguments: Any) -> BatchRenorm2d:
    return BatchRenorm2d.from_batch_norm(pretrained(), **arguments)


@pytest.mark.parametrize("limits", [(1.0, 0.0), (1.2, 0.3), (3.0, 5.0), (1.5, INF), (INF, 0.1), (INF, INF)])
def test_output_and_gradients_are_the_papers(limits: tuple[float, float]) -> None:
    layer, x = renorm(r_max=limits[0], d_max=limits[1]).double(), images().double().requires_grad_()
    values, upstream = values_of(renorm().double()), torch.randn(x.shape, dtype=torch.float64)
    y = layer(x)
    np.testing.assert_allclose(as_array(y), reference.renorm(values, as_array(x), *limits), rtol=1e-9, atol=1e-11)
    y.backward(upstream)
    expected = reference.renorm_gradients(values, as_array(x), as_array(upstream), *limits)
    for name, tensor in {"x": x, "weight": layer.weight, "bias": layer.bias}.items():
        assert tensor.grad is not None
        np.testing.assert_allclose(as_array(tensor.grad), expected[name], rtol=1e-8, atol=1e-10)


def test_without_limits_training_is_a_frozen_forward_pass_bit_for_bit_with_another_gradient() -> None:
    layer = renorm(r_max=INF, d_max=INF, momentum=0.0)
    frozen = FrozenBatchNorm2d.from_batch_norm(pretrained(), "original")
    for step in range(3):
        x = (images() * (step + 1)).requires_grad_()
        outputs = layer(x), frozen(x)
        assert torch.equal(*outputs)
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in outputs]
        assert not torch.allclose(*gradients)
        torch.testing.assert_close(gradients[0].sum((0, 2, 3)), torch.zeros(C), rtol=0, atol=1e-3)
        assert gradients[1].sum((0, 2, 3)).abs().min() > 1
    assert torch.equal(layer.running_mean, pretrained().running_mean)


def test_with_bns_limits_training_is_batch_norm() -> None:
    """batchrenorm's tests: with r = 1 and d = 0 it reduces to BatchNorm."""
    layer, bn, x = renorm(r_max=1.0, d_max=0.0), pretrained(), images()
    torch.testing.assert_close(layer(x), bn(x))


@pytest.mark.parametrize("affine", [True, False])
def test_the_first_batch_of_a_new_layer_is_normalized_by_itself(affine: bool) -> None:
    """batchrenorm, test_step1. Those of a new layer are no statistics to go by."""
    layer, x = BatchRenorm1d(10, affine=affine), torch.randn(100, 10)
    by_itself = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(layer(x), by_itself)
    assert not torch.allclose(layer(x + 1), by_itself, atol=0.1)


def test_training_output_comes_closer_and_closer_to_evaluation_by_the_true_statistics() -> None:
    """batchrenorm, test_ablation."""
    layer = BatchRenorm1d(5, r_max=3.0, d_max=5.0, eps=0.0, momentum=0.01)
    layer.num_batches_tracked.fill_(50_000)
    batches = torch.randn(10, 5, 5) * 10
    mean, var = batches.mean((0, 1)), batches.var((0, 1), correction=0)

    def error() -> float:
        exact = [torch.nn.functional.batch_norm(x, mean, var, eps=0.0) for x in batches]
        return float(np.mean([(layer(x) - y).detach().abs().mean() for x, y in zip(batches, exact, strict=True)]))

    errors = [error() for _ in range(100)]
    assert np.mean(errors[-10:]) < 0.5 * np.mean(errors[:10])


def test_correctness_by_hand() -> None:
    """keras, test_renorm_correctness: its input, no limits, statistics of its own making."""
    layer = BatchRenorm1d(3, r_max=INF, d_max=INF, eps=1e-3, momentum=0.1)
    rng = np.random.default_rng(1337)
    mean, var = rng.normal(size=3), np.abs(rng.normal(1.0, 0.5, size=3))
    x = np.array([[4.0, 6.0, 2.0], [8.0, -2.0, 5.0], [6.0, 4.0, 3.0]])
    layer.running_mean.copy_(torch.from_numpy(mean))
    layer.running_var.copy_(torch.from_numpy(var))
    y = layer(torch.from_numpy(x).float())
    sigma, running = np.sqrt(x.var(0) + 1e-3), np.sqrt(var + 1e-3)
    expected = (x - x.mean(0)) / sigma * (sigma / running) + (x.mean(0) - mean) / running
    np.testing.assert_allclose(as_array(y), expected, atol=1e-5)
    np.testing.assert_allclose(as_array(layer.running_mean), 0.9 * mean + 0.1 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(as_array(layer.running_var), 0.9 * var + 0.1 * x.var(0, ddof=1), rtol=1e-5)


def test_the_momentum_given_is_the_layers_and_none_is_the_batch_norms() -> None:
    bn = pretrained(momentum=0.03)
    assert BatchRenorm2d.from_batch_norm(bn).momentum == 0.03
    layer = BatchRenorm2d.from_batch_norm(bn, momentum=0.01)
    assert layer.momentum == 0.01
    assert layer.to_batch_norm().momentum == 0.03


# The schedule


def limits_over(layer: BatchRenorm2d, steps: int) -> list[tuple[float, float]]:
    found = []
    for _ in range(steps):
        r_max, d_max = layer.limits()
        found.append((float(r_max), float(d_max)))
        layer(images())
    return found


def test_limits_are_batch_norms_and_then_grow_linearly_from_wherever_pretraining_had_come() -> None:
    """batchrenorm and keras count from 0, so a pretrained layer would start at the end of the schedule."""
    layer = renorm(r_max=3.0, d_max=5.0, bn_steps=2, ramp_steps=4)
    assert int(layer.num_batches_tracked) == 7
    expected = [(1, 0), (1, 0), (1, 0), (1.5, 1.25), (2, 2.5), (2.5, 3.75), (3, 5), (3, 5)]
    assert limits_over(layer, 8) == expected


def test_without_a_ramp_the_limits_jump_and_without_steps_they_are_there_at_once() -> None:
    assert limits_over(renorm(bn_steps=2), 4) == [(1, 0), (1, 0), (3, 5), (3, 5)]
    assert limits_over(renorm(), 2) == [(3, 5), (3, 5)]


def test_infinite_limits_are_reached_over_one_minus_t() -> None:
    layer = renorm(r_max=INF, d_max=INF, ramp_steps=4)
    expected = [(1, 0), (4 / 3, 1 / 3), (2, 1), (4, 3), (INF, INF)]
    np.testing.assert_allclose(limits_over(layer, 5), expected, rtol=1e-6)
    x = images()
    fixed = copy.deepcopy(layer).eval()(x)
    assert torch.equal(layer(x), fixed)


@pytest.mark.parametrize("way", ["in memory", "torch.save, weights_only"])
def test_a_checkpoint_goes_on_with_the_schedule_and_a_batch_norms_starts_it(way: str) -> None:
    """Also into a layer made of another BatchNorm, one that had seen no batch."""

    def carried(state: dict[str, Tensor]) -> dict[str, Tensor]:
        if way == "in memory":
            return copy.deepcopy(state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    whole = nn.Sequential(renorm(bn_steps=2, ramp_steps=4))
    whole_limits = limits_over(whole[0], 8)
    first = nn.Sequential(renorm(bn_steps=2, ramp_steps=4))
    first_limits = limits_over(first[0], 3)
    second = nn.Sequential(BatchRenorm2d.from_batch_norm(nn.BatchNorm2d(C), bn_steps=2, ramp_steps=4))
    second.load_state_dict(carried(first.state_dict()), strict=True)
    assert first_limits + limits_over(second[0], 5) == whole_limits
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value)
    second.load_state_dict(carried(nn.Sequential(pretrained()).state_dict()), strict=True)
    assert limits_over(second[0], 8) == whole_limits
    vanilla = nn.Sequential(nn.BatchNorm2d(C))
    vanilla.load_state_dict(carried(first.state_dict()), strict=True)


def test_a_state_dict_that_lost_its_metadata_starts_the_schedule_anew() -> None:
    layer = renorm(ramp_steps=4)
    limits_over(layer, 3)
    layer.load_state_dict(dict(layer.state_dict()), strict=True)
    assert limits_over(layer, 2) == [(1, 0), (1.5, 1.25)]


def test_the_schedule_needs_no_new_compilation_in_each_step() -> None:
    torch._dynamo.reset()
    layer = renorm(ramp_steps=4)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(5):
        compiled(images())
    assert counter.frame_count == 1
    assert limits_over(layer, 1) == [(3, 5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r_max": 0.9}, "r_max: got 0.9; allowed: a number from 1 on, or inf"),
        ({"r_max": math.nan}, "r_max: got nan"),
        ({"r_max": True}, "r_max: got True"),
        ({"r_max": "3"}, "r_max: got '3'"),
        ({"d_max": -0.1}, "d_max: got -0.1; allowed: a number from 0 on, or inf"),
        ({"d_max": None}, "d_max: got None"),
        ({"bn_steps": -1}, "bn_steps: got -1; allowed: a whole number from 0 on"),
        ({"ramp_steps": 0.5}, "ramp_steps: got 0.5; allowed: a whole number from 0 on"),
    ],
)
def test_limits_and_steps_out_of_range_are_one_clear_error(arguments: dict[str, Any], message: str) -> None:
    """keras, test_renorm_invalid_clipping_keys."""
    for make in (lambda: BatchRenorm2d(C, **arguments), lambda: renorm(**arguments)):
        with pytest.raises(FinetuneBNError, match=message):
            make()


def test_a_momentum_out_of_range_is_one_clear_error() -> None:
    with pytest.raises(FinetuneBNError, match=r"momentum: got 1.5; allowed: a number from 0 to 1"):
        renorm(momentum=1.5)


def test_it_says_what_it_is() -> None:
    expected = "BatchRenorm2d(4, r_max=inf, d_max=5, bn_steps=0, ramp_steps=2, eps=1e-05, momentum=0.1, affine=True)"
    assert repr(BatchRenorm2d(C, INF, 5, ramp_steps=2)) == expected
