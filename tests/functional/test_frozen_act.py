"""Frozen BatchNorm and activation in one step: same bits, same gradients, one tensor kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.functional.frozen_act import (
    FEWEST_IN_ONE_STEP,
    RECOMPUTED,
    frozen_batch_norm_act,
    frozen_batch_norm_relu,
    relu_tells_input,
)
from finetune_bn.layers.norm_act import FrozenBatchNormAct2d
from tests.models import settle
from tests.tools import saved_bytes

SHAPE = (4, 5, 6, 6)


def statistics(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Return (running_mean, running_var, weight, bias); one weight is negative."""
    mean, var = torch.randn(5, dtype=dtype), torch.rand(5, dtype=dtype) + 0.2
    weight, bias = torch.rand(5, dtype=dtype) + 0.3, torch.randn(5, dtype=dtype)
    weight[1] *= -1
    return mean, var, weight.requires_grad_(), bias.requires_grad_()


def references(x: Tensor, arguments: tuple[Tensor, ...], act: str, grad: Tensor) -> tuple[Tensor, ...]:
    """Return output and gradients of x, weight and bias by the formula, in plain tensor operations."""
    mean, var, weight, bias = (t.view(1, -1, 1, 1) for t in arguments)
    z = (x - mean) / (var + 1e-5).sqrt() * weight + bias
    y = {"ReLU": torch.relu, **{name: pair[0] for name, pair in RECOMPUTED.items()}}[act](z)
    return y, *torch.autograd.grad(y, [x, arguments[2], arguments[3]], grad)


def ours(x: Tensor, arguments: tuple[Tensor, ...], act: str) -> Tensor:
    if act == "ReLU":
        return frozen_batch_norm_relu(x, *arguments, 1e-5)
    return frozen_batch_norm_act(x, *arguments, 1e-5, act)


@pytest.mark.parametrize("act", ["ReLU", *RECOMPUTED])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs_and_gradients_are_those_of_the_formula(act: str, layout: torch.memory_format) -> None:
    arguments = statistics()
    x = torch.randn(SHAPE, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(SHAPE, dtype=torch.float64)
    y = ours(x, arguments, act)
    gradients = torch.autograd.grad(y, [x, *arguments[2:]], grad)
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close((y, *gradients), references(x, arguments, act, grad), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("act", ["ReLU", *RECOMPUTED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_output_is_that_of_the_two_layers_bit_for_bit(act: str, dtype: torch.dtype) -> None:
    arguments = statistics(torch.float32)
    x = torch.randn(SHAPE).to(dtype).requires_grad_()
    mean, var, weight, bias = arguments
    expected = getattr(nn, act)()(F.batch_norm(x, mean, var, weight, bias, False, 0.0, 1e-5))
    y = ours(x, arguments, act)
    assert torch.equal(y, expected)
    for gradient, tensor in zip(torch.autograd.grad(y.sum(), [x, weight, bias]), (x, weight, bias), strict=True):
        assert gradient.dtype == tensor.dtype


@pytest.mark.parametrize("act", ["ReLU", *RECOMPUTED])
def test_second_derivatives_are_right(act: str) -> None:
    mean, var, weight, bias = statistics()
    x = torch.randn(2, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    call = lambda x, weight, bias: ours(x, (mean, var, weight, bias), act)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, weight, bias))
    assert torch.autograd.gradgradcheck(call, (x, weight, bias))


@pytest.mark.parametrize("act", ["ReLU", *RECOMPUTED])
def test_per_sample_gradients_by_vmap_are_those_of_each_image_by_itself(act: str) -> None:
    images, (mean, var, weight, bias) = torch.randn(4, 2, 5, 3, 3).double(), statistics()

    def loss(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        return ours(x, (mean, var, weight, bias), act).square().sum()

    found = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0))(weight, bias, images)
    for i, x in enumerate(images):
        leaves = [t.detach().clone().requires_grad_() for t in (weight, bias)]
        expected = torch.autograd.grad(loss(*leaves, x), leaves)
        for all_images, one in zip(found, expected, strict=True):
            torch.testing.assert_close(all_images[i], one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("weight", "bias", "dtype", "safe"),
    [
        (1.0, 0.5, torch.float32, True),
        (-1.0, 0.5, torch.float32, True),
        (1e-3, 0.0, torch.float32, True),
        (0.1, 6.3, torch.float32, True),
        (0.1, 6.5, torch.float32, False),
        (-0.1, -6.5, torch.float32, False),
        (0.1, 1.5, torch.bfloat16, True),
        (0.1, 1.7, torch.bfloat16, False),
        (0.0, 0.0, torch.float32, False),
        (0.0, 1.0, torch.float64, False),
        (1e-3, 0.0, torch.float16, False),
        (0.01, 0.0, torch.float16, True),
        (float("nan"), 0.0, torch.float32, False),
    ],
)
def test_the_input_is_kept_where_the_weight_is_small_beside_the_bias(
    weight: float, bias: float, dtype: torch.dtype, safe: bool
) -> None:
    assert relu_tells_input(torch.tensor([1.0, weight]), torch.tensor([1.0, bias]), None, dtype) == safe


def layer(affine: str = "original", act: type[nn.Module] = nn.ReLU) -> FrozenBatchNormAct2d:
    timm = pytest.importorskip("timm.layers")
    bn = settle(timm.BatchNormAct2d(5, act_layer=act))
    norm = FrozenBatchNormAct2d.from_batch_norm(bn, affine)  # type: ignore[arg-type]
    norm.fold = "always"  # by itself it does so for large activations
    return norm


def kept(norm: nn.Module) -> float:
    """Return the bytes kept of a norm+act layer and a convolution behind it, in units of its input."""
    conv = nn.Conv2d(5, 2, 1)
    x = torch.randn(8, 5, 32, 32, requires_grad=True)
    return saved_bytes(nn.ModuleList([norm, conv]), lambda: conv(norm(x * 1))) / x.nbytes


@pytest.mark.parametrize("affine", ["original", "merged"])
def test_a_layer_keeps_one_tensor_with_relu_and_two_with_silu(affine: str) -> None:
    assert 1 <= kept(layer(affine)) < 1.1  # the output, which the convolution keeps
    assert 2 <= kept(layer(affine, nn.SiLU)) < 2.1  # the input, and the output that the convolution keeps
    assert 2 <= kept(layer(affine, nn.Tanh)) < 2.1  # as autograd does it


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
def test_left_to_itself_a_layer_saves_memory_where_the_activation_is_large_and_time_where_it_is_small(
    act: type[nn.Module],
) -> None:
    norm = layer(act=act)
    norm.fold = "auto"
    for images, large in ((1, False), (FEWEST_IN_ONE_STEP // (5 * 64 * 64) + 1, True)):
        x = torch.randn(images, 5, 64, 64, requires_grad=True)
        assert (x.numel() >= FEWEST_IN_ONE_STEP) is large
        assert (norm(x * 1).grad_fn.name() in ("_ReLUBackward", "_RecomputedBackward")) is large  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-9])
@pytest.mark.parametrize("affine", ["original", "merged"])
def test_a_weight_next_to_zero_keeps_the_input_and_the_gradient_right(affine: str, value: float) -> None:
    norm = layer(affine)
    with torch.no_grad():
        norm.weight[2] = value
        norm.bias[2] = 0.7
    assert kept(norm) >= 2
    x = torch.randn(SHAPE)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        images = x.to(dtype).requires_grad_()
        return torch.autograd.grad(norm.to(dtype)(images).square().sum(), [images, norm.weight, norm.bias])

    single, double = gradients(torch.float32), gradients(torch.float64)
    images = x.double().requires_grad_()
    mean, var, weight, bias = (
        getattr(norm, name).view(1, -1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
    )
    z = (images - mean) / (var + norm.eps).sqrt() * weight + bias
    exact = torch.autograd.grad(z.relu().square().sum(), [images, norm.weight, norm.bias])
    torch.testing.assert_close(double, exact, rtol=1e-10, atol=1e-10)
    for gradient, reference in zip(single, exact, strict=True):
        assert float((gradient - reference).abs().max() / reference.abs().max()) <= 1e-5


@pytest.mark.parametrize("affine", ["original", "merged"])
def test_at_the_edge_of_the_rule_float32_gradients_are_right_to_1e_minus_5(affine: str) -> None:
    norm = layer(affine)
    with torch.no_grad():
        norm.bias.copy_(60 * norm.weight.abs() * (1.0 if affine == "original" else norm._source[0].running_var.sqrt()))
    assert kept(norm) < 1.1
    x = torch.randn(SHAPE)
    single, double = x.clone().requires_grad_(), x.double().requires_grad_()
    actual = torch.autograd.grad(norm(single).square().sum(), [single, norm.weight, norm.bias])
    norm.double()
    exact = torch.autograd.grad(norm(double).square().sum(), [double, norm.weight, norm.bias])
    for gradient, reference in zip(actual, exact, strict=True):
        assert float((gradient - reference).abs().max() / reference.abs().max()) <= 1e-5


def test_merged_layers_whose_statistics_are_lost_keep_their_input() -> None:
    norm = layer("merged")
    norm._source = ()
    assert kept(norm) >= 2


def test_hooks_drop_and_constant_scales_are_left_to_autograd() -> None:
    called = []
    norm = layer()
    norm.act.register_forward_hook(lambda m, a, y: called.append(1))
    norm(torch.randn(SHAPE))
    assert called == [1]
    norm = layer()
    norm.drop = nn.Dropout(0.5)
    assert kept(norm.train()) > 2
    assert 1 <= kept(layer("shift")) < 1.1


def test_preactivation_nets_keep_at_most_three_quarters_of_live_batch_norm() -> None:
    timm = pytest.importorskip("timm")
    model = settle(timm.create_model("densenet121", growth_rate=8, block_config=(2, 2, 2, 2)))
    x = torch.randn(2, 3, 64, 64)
    live = saved_bytes(model, lambda: model.eval()(x))
    for affine in ("original", "merged"):
        for fold in ("always", "never"):
            fbn.convert(model, fbn.Freeze(affine, fold=fold), verify=False)  # type: ignore[arg-type]
            assert saved_bytes(model, lambda: model(x)) <= 0.75 * live
        fbn.revert(model, verify=False)


def test_compiled_layers_give_the_same_gradients() -> None:
    x = torch.randn(SHAPE)
    for act in (nn.ReLU, nn.SiLU):
        norm = layer(act=act)
        expected = torch.autograd.grad(norm(x).square().sum(), [norm.weight, norm.bias])
        torch._dynamo.reset()
        compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
        actual = torch.autograd.grad(compiled(x).square().sum(), [norm.weight, norm.bias])
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ["ReLU", *RECOMPUTED])
def test_gradients_that_are_to_be_differentiated_again_are_those_of_the_formula_too(act: str) -> None:
    arguments = statistics()
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(SHAPE, dtype=torch.float64)
    inputs = [x, arguments[2], arguments[3]]
    found = torch.autograd.grad(ours(x, arguments, act), inputs, grad, create_graph=True)
    for one, expected in zip(found, references(x, arguments, act, grad)[1:], strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-10)
