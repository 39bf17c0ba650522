"""Frozen BatchNorm with the noise of a batch's statistics: frozen in evaluation, in training scattered around it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import FinetuneBNError
from finetune_bn.functional.frozen import TOLERANCE
from finetune_bn.layers import (
    FrozenBatchNorm,
    FrozenBatchNorm2d,
    NoisyFrozenBatchNorm,
    NoisyFrozenBatchNorm1d,
    NoisyFrozenBatchNorm2d,
    NoisyFrozenBatchNorm3d,
)
from finetune_bn.layers.frozen import LEARNABLE, Affine
from tests.models import settle
from tests.tools import assert_same_state, saved_bytes

C = 5
AFFINE: tuple[Affine, ...] = ("none", "shift", "original")
DIMENSIONS: dict[str, tuple[type[_BatchNorm], type[NoisyFrozenBatchNorm], tuple[int, ...]]] = {
    "any": (nn.SyncBatchNorm, NoisyFrozenBatchNorm, (3, 3)),
    "1d, no length": (nn.BatchNorm1d, NoisyFrozenBatchNorm1d, ()),
    "1d": (nn.BatchNorm1d, NoisyFrozenBatchNorm1d, (3,)),
    "2d": (nn.BatchNorm2d, NoisyFrozenBatchNorm2d, (3, 3)),
    "3d": (nn.BatchNorm3d, NoisyFrozenBatchNorm3d, (2, 3, 3)),
}


@pytest.fixture(params=AFFINE)
def affine(request: pytest.FixtureRequest) -> Affine:
    return request.param


def pretrained(live: type[_BatchNorm] = nn.BatchNorm2d) -> _BatchNorm:
    bn = live(C)
    settle(bn)
    return bn


def images(n: int = 32, space: tuple[int, ...] = (3, 3)) -> Tensor:
    """Images of the layer's own statistics, whose pixels have half of their variance in common."""
    bn, shape = pretrained(), [1, C] + [1] * len(space)
    common = torch.randn(n, C, *[1] * len(space))
    noise = (common + torch.randn(n, C, *space)) / 2**0.5
    return noise * bn.running_var.sqrt().view(shape) + bn.running_mean.view(shape)


def noisy(affine: Affine = "none", noise: int = 16, measured: int = 20) -> NoisyFrozenBatchNorm2d:
    layer = NoisyFrozenBatchNorm2d.from_batch_norm(pretrained(), affine, noise)
    for _ in range(measured):
        layer(images())
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_in_eval_mode_it_is_batch_norm_bit_for_bit_and_in_training_it_is_not(
    dimensions: str, dtype: torch.dtype, affine: Affine
) -> None:
    live, noisy_class, space = DIMENSIONS[dimensions]
    bn = pretrained(live).eval().to(dtype)
    layer = noisy_class.from_batch_norm(bn, affine, 8).train()
    x = images(8, space).to(dtype)
    assert torch.equal(layer(x), bn(x))  # nothing has been measured yet
    assert layer(x).dtype == dtype
    assert not torch.allclose(layer(x).float(), bn(x).float(), rtol=0.01)
    assert torch.equal(layer.eval()(x), bn(x))


def test_the_noise_has_the_size_that_batch_norms_has_in_batches_of_so_many_images() -> None:
    """The standard deviation over draws of an image's output, against that over batches that the image is put in."""
    layer, bn = noisy(noise=16, measured=100), pretrained()
    nn.init.ones_(bn.weight)
    x = images(1)
    with torch.no_grad():
        drawn = torch.stack([NoisyFrozenBatchNorm2d.forward(layer, x) for _ in range(600)]).std(0)
        live = torch.stack([bn(torch.cat([x, images(16)]))[:1] for _ in range(600)]).std(0)
    gamma = pretrained().weight.detach().view(1, C, 1, 1)
    ratio = (drawn / gamma / live).mean()
    assert 0.9 < float(ratio) < 1.1


def test_an_image_does_not_depend_on_its_peers() -> None:
    layer, x = noisy(), images()
    other = torch.cat([x[:1], images(31) * 5 + 3])
    outputs = []
    for batch in (x, other):
        torch.manual_seed(0)
        outputs.append(copy.deepcopy(layer)(batch)[0])
    assert torch.equal(*outputs)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0].sum(), x)
    assert gradient[0].abs().min() > 0
    assert not gradient[1:].any()


def test_the_images_of_a_batch_share_the_draw() -> None:
    layer, x = noisy(), images(1).repeat(4, 1, 1, 1)
    y = layer(x)
    assert torch.equal(y[0], y[3])


def test_a_batch_of_one_image_is_normalized_with_noise_and_tells_nothing() -> None:
    layer = noisy()
    before = copy.deepcopy(dict(layer.named_buffers()))
    y = layer(images(1))
    assert torch.isfinite(y).all()
    assert_same_state(dict(layer.named_buffers()), before)


def test_what_is_measured_is_an_average_over_the_batches() -> None:
    layer = noisy(measured=200)
    assert int(layer.batches_measured) == 200
    var = layer.running_var
    torch.testing.assert_close(layer.spread_of_mean, var * (0.5 + 0.5 / 9), rtol=0.2, atol=0)


def test_it_is_a_frozen_layer_that_trains_what_the_affine_kind_says(affine: Affine) -> None:
    layer = noisy(affine)
    assert isinstance(layer, FrozenBatchNorm)
    assert not isinstance(layer, _BatchNorm)
    assert {name for name, _ in layer.named_parameters()} == set(LEARNABLE[affine])
    before = copy.deepcopy(layer.state_dict())
    layer.requires_grad_(True)
    x = images().requires_grad_()
    layer(x).square().sum().backward()
    assert_same_state(layer.state_dict(), before)


def test_noise_keeps_no_activation_for_backward() -> None:
    layer, frozen, x = noisy("shift"), FrozenBatchNorm2d.from_batch_norm(pretrained(), "shift"), images()
    x.requires_grad_()
    assert saved_bytes(layer, lambda: layer(x)) <= saved_bytes(frozen, lambda: frozen(x)) + 16 * C


def test_it_turns_back_into_the_batch_norm_bit_for_bit(affine: Affine) -> None:
    bn = pretrained()
    layer = NoisyFrozenBatchNorm2d.from_batch_norm(bn, affine, 8)
    layer(images())
    assert layer.to_batch_norm() is bn
    assert_same_state(bn.state_dict(), pretrained().state_dict())


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_checkpoint_carries_what_was_measured_under_batch_norms_names(weights_only: bool) -> None:
    layer, bn = noisy(), nn.BatchNorm2d(C)
    file = io.BytesIO()
    torch.save(nn.Sequential(layer).state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=weights_only)
    assert [name.partition(".")[2] for name in state] == list(bn.state_dict())
    nn.Sequential(bn).load_state_dict(state, strict=True)
    other = NoisyFrozenBatchNorm2d(C, noise=16)
    nn.Sequential(other).load_state_dict(state, strict=True)
    x = images()
    outputs = []
    for each in (layer, other):
        torch.manual_seed(0)
        outputs.append(each.train()(x))
    assert torch.equal(*outputs)
    other.load_state_dict(pretrained().state_dict(), strict=True)
    assert int(other.batches_measured) == 0


def test_on_the_meta_device_it_can_be_filled_later() -> None:
    with torch.device("meta"):
        layer = NoisyFrozenBatchNorm2d.from_batch_norm(nn.BatchNorm2d(C), "original", 8)
    layer.load_state_dict(pretrained().state_dict(), assign=True)
    x = images()
    torch.testing.assert_close(layer(x), pretrained().eval()(x))
    assert torch.isfinite(layer(x)).all()


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_copies_are_whole(way: str) -> None:
    layer, x = noisy(), images()
    other: Any = copy.deepcopy(layer)
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    torch.manual_seed(0)
    expected = layer(x)
    torch.manual_seed(0)
    assert torch.equal(other(x), expected)
    assert other.noise == 16


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_compiles_without_a_graph_break(affine: Affine, mode: bool) -> None:
    torch._dynamo.reset()
    layers = [noisy(affine).train(mode) for _ in range(2)]
    layers[0].load_state_dict(layers[1].state_dict())
    compiled = torch.compile(layers[0], backend="aot_eager", fullgraph=True)
    batches, results = [images(), images(8)], []
    for run in (compiled, layers[1]):
        torch.manual_seed(0)
        x = [batch.clone().requires_grad_() for batch in batches]
        y = [run(batch) for batch in x]
        results.append([*y, *torch.autograd.grad(sum(part.pow(3).sum() for part in y), x)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE[torch.float32], atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": 1}, "noise: got 1; allowed: a whole number of images from 2 on"),
        ({"noise": 0}, "noise: got 0"),
        ({"noise": 8.0}, "noise: got 8.0"),
        ({"noise": True}, "noise: got True"),
        ({"affine": "merged"}, "noise: got 32; allowed: none with affine='merged'.*take affine='original'"),
        ({"affine": "gamma"}, "affine: got 'gamma'"),
    ],
)
def test_bad_arguments_are_one_clear_error(arguments: dict[str, Any], message: str) -> None:
    for make in (
        lambda: NoisyFrozenBatchNorm2d(C, **arguments),
        lambda: NoisyFrozenBatchNorm2d.from_batch_norm(pretrained(), **arguments),
    ):
        with pytest.raises(FinetuneBNError, match=message):
            make()


def test_it_says_what_it_is() -> None:
    assert repr(NoisyFrozenBatchNorm2d(C, noise=8)) == "NoisyFrozenBatchNorm2d(5, eps=1e-05, affine='none', noise=8)"
