"""Stochastic norm, drawn anew for each channel and batch; eval norm, which counts the image in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import FinetuneBNError
from finetune_bn.layers import (
    EvalBatchNorm,
    EvalBatchNorm1d,
    EvalBatchNorm2d,
    EvalBatchNorm3d,
    StochasticBatchNorm2d,
)
from tests import batch_references as reference
from tests.models import settle
from tests.references import as_array, values_of

C = 64


def images(n: int = 6, space: tuple[int, ...] = (3, 3)) -> Tensor:
    return torch.randn((n, C, *space), generator=torch.Generator().manual_seed(2)) * 2 + 1


def pretrained(live: type[_BatchNorm] = nn.BatchNorm2d) -> _BatchNorm:
    bn = live(C)
    settle(bn)
    return bn


# Stochastic norm


def drawn(layer: StochasticBatchNorm2d, x: Tensor) -> Tensor:
    """Return which channels the next batch is normalized by itself in; each is one or the other, or fails."""
    live, fixed = pretrained()(x), pretrained().eval()(x)
    layer.running_mean.copy_(pretrained().running_mean)
    layer.running_var.copy_(pretrained().running_var)
    y = layer(x)
    is_live = (y - live).abs().amax((0, 2, 3)) < 1e-5
    is_fixed = (y - fixed).abs().amax((0, 2, 3)) < 1e-5
    assert torch.equal(is_live, ~is_fixed)
    return is_live


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9, 1.0])
def test_a_channel_goes_by_the_batch_with_the_probability_asked_for(p: float) -> None:
    """TLL's convert_model hands p on as track_running_stats, so it stays one half."""
    layer, x = StochasticBatchNorm2d.from_batch_norm(pretrained(), p), images()
    draws = torch.stack([drawn(layer, x) for _ in range(30)])
    assert float(draws.float().mean()) == pytest.approx(p, abs=0.05)
    if 0 < p < 1:
        assert (draws != draws[0]).any()  # anew in each batch
        assert (draws != draws[:, :1]).any()  # and each channel by itself


def test_all_images_of_a_batch_share_the_draw_and_the_seed_decides_it() -> None:
    layer, x = StochasticBatchNorm2d.from_batch_norm(pretrained()), images()
    torch.manual_seed(3)
    first = drawn(layer, x)
    torch.manual_seed(3)
    assert torch.equal(drawn(layer, x), first)
    assert not torch.equal(drawn(layer, x), first)


def test_output_is_the_papers_mixture() -> None:
    layer, x = StochasticBatchNorm2d.from_batch_norm(pretrained()), images()
    values = values_of(layer)
    torch.manual_seed(3)
    s = as_array(torch.rand(C) < 0.5)
    torch.manual_seed(3)
    np.testing.assert_allclose(as_array(layer(x)), reference.stochastic(values, as_array(x), s), rtol=1e-4, atol=1e-4)


def test_with_no_probability_the_statistics_are_tracked_all_the_same() -> None:
    layer, bn, x = StochasticBatchNorm2d.from_batch_norm(pretrained(), 0.0), pretrained(), images()
    expected = bn.eval()(x)
    bn.train()(x)
    assert torch.equal(layer(x), expected)
    torch.testing.assert_close(layer.running_mean, bn.running_mean)
    torch.testing.assert_close(layer.running_var, bn.running_var)


def test_the_first_batch_of_a_new_layer_is_normalized_by_itself() -> None:
    x = images()
    torch.testing.assert_close(StochasticBatchNorm2d(C, 0.0)(x), nn.BatchNorm2d(C)(x))


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), None, "0.5", True])
def test_what_is_no_probability_is_one_clear_error(p: Any) -> None:
    for make in (
        lambda: StochasticBatchNorm2d(C, p),
        lambda: StochasticBatchNorm2d.from_batch_norm(pretrained(), p),
    ):
        with pytest.raises(FinetuneBNError, match=r"p: got .*; allowed: a number from 0 .* to 1"):
            make()


# Eval norm

DIMENSIONS: dict[str, tuple[type[_BatchNorm], type[EvalBatchNorm], tuple[int, ...]]] = {
    "any": (nn.SyncBatchNorm, EvalBatchNorm, (3, 3)),
    "1d, no length": (nn.BatchNorm1d, EvalBatchNorm1d, ()),
    "1d": (nn.BatchNorm1d, EvalBatchNorm1d, (3,)),
    "2d": (nn.BatchNorm2d, EvalBatchNorm2d, (3, 3)),
    "3d": (nn.BatchNorm3d, EvalBatchNorm3d, (2, 3, 3)),
}


@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_evaluation_mixes_the_image_in_and_no_other_image(dimensions: str) -> None:
    live, eval_class, space = DIMENSIONS[dimensions]
    layer = eval_class.from_batch_norm(pretrained(live), alpha=0.25).eval()
    x = images(space=space)
    y = layer(x)
    expected = reference.eval_norm(values_of(layer), as_array(x), 0.25)
    np.testing.assert_allclose(as_array(y), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(y[2:3], layer(x[2:3]))
    assert not torch.allclose(y, pretrained(live).eval()(x))


def test_training_is_batch_norms() -> None:
    layer, bn, x = EvalBatchNorm2d.from_batch_norm(pretrained(), 0.25), pretrained(), images()
    assert torch.equal(layer(x), bn(x))
    torch.testing.assert_close(layer.running_mean, bn.running_mean)
    torch.testing.assert_close(layer.running_var, bn.running_var)


def test_a_batch_of_one_value_in_training_counts_nothing_in() -> None:
    layer, x = EvalBatchNorm2d.from_batch_norm(pretrained(), 0.25), images(1, (1, 1))
    assert torch.equal(layer(x), pretrained().eval()(x))
    assert int(layer.num_fallbacks) == 1


def test_for_a_while_it_can_evaluate_as_batch_norm() -> None:
    layer, x = EvalBatchNorm2d.from_batch_norm(pretrained(), 0.25).eval(), images()
    before = layer(x)
    with layer.as_batch_norm():
        assert torch.equal(layer(x), pretrained().eval()(x))
    with pytest.raises(ValueError, match="4D"), layer.as_batch_norm():
        layer(x[0])
    assert torch.equal(layer(x), before)


def test_evaluation_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    layer, x = EvalBatchNorm2d.from_batch_norm(pretrained(), 0.25).eval(), images()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("alpha", [-0.1, 1.0, float("nan"), None, "0.5", True])
def test_what_is_no_weight_is_one_clear_error(alpha: Any) -> None:
    for make in (lambda: EvalBatchNorm2d(C, alpha), lambda: EvalBatchNorm2d.from_batch_norm(pretrained(), alpha)):
        with pytest.raises(FinetuneBNError, match=r"alpha: got .*; allowed: a number from 0 to less than 1\. 1 / \("):
            make()


def test_they_say_what_they_are() -> None:
    assert (
        repr(StochasticBatchNorm2d(8, 0.3)) == "StochasticBatchNorm2d(8, p=0.3, eps=1e-05, momentum=0.1, affine=True)"
    )
    assert repr(EvalBatchNorm1d(8, 0.25)) == "EvalBatchNorm1d(8, alpha=0.25, eps=1e-05, momentum=0.1, affine=True)"
