"""A frozen layer that shares the backward pass of the convolution in front: the same numbers, and less kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import finetune_bn as fbn
from finetune_bn.functional.eager_step import Constants
from finetune_bn.functional.shared_backward import fewest, pays, producer_of
from finetune_bn.layers.frozen import FrozenBatchNorm
from tests.models import Plain, settle
from tests.tools import saved_bytes

IMAGES = (4, 3, 9, 9)
LEARNABLE = ("merged", "original")
Outcome = tuple[Tensor, dict[str, Tensor]]


class Residual(nn.Module):
    """conv - BN - ReLU - conv - BN, added to a projection with a BN of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(y + self.shortcut(x))


def frozen(model: nn.Module, affine: str = "original", fold: str = "always") -> nn.Module:
    return fbn.convert(settle(model), fbn.Freeze(affine, fold=fold), verify=False)  # type: ignore[arg-type]


def set_fold(model: nn.Module, fold: Any) -> None:
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm):
            module.fold = fold


def sharing(model: nn.Module, x: Tensor) -> list[bool]:
    """Tell of each frozen layer, in the order of running, whether it shares backward in a step on `x`."""
    found: list[bool] = []
    hooks = [
        module.register_forward_hook(lambda m, a, z: found.append("_Shared" in type(z.grad_fn).__name__))
        for module in model.modules()
        if isinstance(module, FrozenBatchNorm)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def step(model: nn.Module, x: Tensor) -> Outcome:
    """Return output and gradients by name of one training step's forward and backward; the input's is "x"."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad(set_to_none=True)
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    (y * weights).sum().backward()
    assert x.grad is not None
    return y.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}


def assert_close(actual: Outcome, expected: Outcome, gradients: float | None = None) -> None:
    """Assert that the outputs are the same bits and the gradients the same numbers."""
    assert torch.equal(actual[0], expected[0])
    tolerance = gradients or (1e-10 if expected[0].dtype == torch.float64 else 2e-5)
    assert actual[1].keys() == expected[1].keys()
    for name, reference in expected[1].items():
        off = float((actual[1][name] - reference).abs().max() / reference.abs().max())
        assert off <= tolerance, f"{name}: {off:.2g}"


def same_as_apart(model: nn.Module, x: Tensor) -> None:
    set_fold(model, "never")
    expected = step(model, x)
    set_fold(model, "always")
    assert_close(step(model, x), expected)


# Equality


def pair(conv: type[nn.Module], norm: type[nn.Module], *arguments: Any, **settings: Any) -> Callable[[bool], nn.Module]:
    return lambda bias: nn.Sequential(conv(4, 6, *arguments, bias=bias, **settings), norm(6))


PAIRS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "conv1d": (pair(nn.Conv1d, nn.BatchNorm1d, 3), (3, 4, 8)),
    "conv2d": (pair(nn.Conv2d, nn.BatchNorm2d, 3, stride=2), (3, 4, 8, 7)),
    "conv3d": (pair(nn.Conv3d, nn.BatchNorm3d, 2), (2, 4, 4, 4, 4)),
    "grouped": (pair(nn.Conv2d, nn.BatchNorm2d, 3, groups=2), (3, 4, 6, 6)),
    "dilated": (pair(nn.Conv2d, nn.BatchNorm2d, 3, dilation=2), (3, 4, 8, 8)),
    "same": (pair(nn.Conv2d, nn.BatchNorm2d, (2, 3), padding="same"), (3, 4, 6, 6)),
    "valid": (pair(nn.Conv2d, nn.BatchNorm2d, 3, padding="valid"), (3, 4, 6, 6)),
    "circular": (pair(nn.Conv2d, nn.BatchNorm2d, 3, padding=(1, 2), padding_mode="circular"), (3, 4, 6, 6)),
    "one image": (pair(nn.Conv2d, nn.BatchNorm2d, 3), (1, 4, 6, 6)),
}


@pytest.mark.parametrize("affine", LEARNABLE)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", PAIRS)
def test_outputs_are_the_same_bits_and_gradients_the_same_numbers(name: str, bias: bool, affine: str) -> None:
    make, shape = PAIRS[name]
    for dtype in (torch.float64, torch.float32):
        x = torch.randn(shape, dtype=dtype)
        model = frozen(make(bias).to(dtype), affine)
        assert sharing(model, x) == [True]
        same_as_apart(model, x)


def test_the_gradients_are_those_of_the_formula() -> None:
    """For a 1 x 1 convolution, in float64 numpy: z = scale (W x + b - mean) + beta."""
    model = frozen(nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)).double())
    conv, norm = model[0], model[1]  # type: ignore[index]
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    _, found = step(model, x)
    g = torch.randn(3, 6, 5, 5, generator=torch.Generator().manual_seed(3)).double().numpy()
    w, b = conv.weight.detach().numpy()[:, :, 0, 0], conv.bias.detach().numpy()
    gamma, mean, var = (t.detach().numpy() for t in (norm.weight, norm.running_mean, norm.running_var))
    rsigma = 1 / np.sqrt(var + norm.eps)
    y = np.einsum("ck,nkhw->nchw", w, x.numpy()) + b[:, None, None]
    of_y = g * (gamma * rsigma)[:, None, None]
    expected = {
        "0.weight": np.einsum("nchw,nkhw->ck", of_y, x.numpy())[:, :, None, None],
        "0.bias": of_y.sum((0, 2, 3)),
        "1.weight": (g * (y - mean[:, None, None]) * rsigma[:, None, None]).sum((0, 2, 3)),
        "1.bias": g.sum((0, 2, 3)),
        "x": np.einsum("ck,nchw->nkhw", w, of_y),
    }
    for name, reference in expected.items():
        np.testing.assert_allclose(found[name].numpy(), reference, rtol=1e-10, atol=1e-10)


def test_a_scale_of_zero_and_a_negative_one_are_exact() -> None:
    model = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)).double())
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.0, -1.0, 1e-300, 2.0]))  # type: ignore[index]
    same_as_apart(model, torch.randn(IMAGES, dtype=torch.float64))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_in_float32_a_nets_gradients_are_no_further_from_float64_than_unshared_ones(name: str) -> None:
    model = pytest.importorskip("timm").create_model(name)
    model(torch.randn(8, 3, 64, 64))  # statistics of its own
    model, x = frozen(model.eval()), torch.randn(4, 3, 64, 64)
    exact = step(copy.deepcopy(model).double(), x.double())[1]
    middle = {}
    for fold in ("always", "never"):
        set_fold(model, fold)
        found = step(model, x)[1]
        middle[fold] = float(np.median([float((found[n].double() - g).norm() / g.norm()) for n, g in exact.items()]))
    assert middle["always"] <= 1.2 * middle["never"]


def test_standardized_and_parametrized_convolutions_share_too() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    convs = (
        timm_layers.StdConv2d(3, 6, 3),
        timm_layers.Conv2dSame(3, 6, 3, stride=2),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)),
    )
    for conv in convs:
        model = frozen(nn.Sequential(conv, nn.BatchNorm2d(6)).double())
        x = torch.randn(IMAGES, dtype=torch.float64)
        assert sharing(model, x) == [True]
        same_as_apart(model, x)


@pytest.mark.parametrize("what", ["the weight", "gamma", "all but the input", "gamma over a constant weight"])
def test_only_what_is_trained_gets_a_gradient(what: str) -> None:
    model = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).double())
    conv, norm = model[2], model[3]  # type: ignore[index]
    x = torch.randn(IMAGES, dtype=torch.float64)
    if what == "gamma over a constant weight":
        conv.weight.requires_grad_(False)
    wanted = {"the weight": [conv.weight], "gamma": [norm.weight]}.get(
        what, [p for p in model.parameters() if p.requires_grad]
    )
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(any(parameter is w for w in wanted))
    found = []
    for fold in ("always", "never"):
        set_fold(model, fold)
        found.append(torch.autograd.grad(model(x).square().sum(), wanted))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_second_derivatives_are_those_of_the_unshared_layer() -> None:
    x = torch.randn(IMAGES, dtype=torch.float64, requires_grad=True)
    model = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh()).double())
    found = []
    for fold in ("always", "never"):
        set_fold(model, fold)
        wanted = [x, *model.parameters()]
        first = torch.autograd.grad(model(x).square().sum(), wanted, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))  # type: ignore[arg-type]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_per_sample_gradients_by_vmap_are_those_of_the_unshared_layer() -> None:
    x = torch.randn(IMAGES, dtype=torch.float64)
    model = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double())
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    found = []
    for fold in ("always", "never"):
        set_fold(model, fold)
        found.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.01, momentum=0.9), torch.optim.AdamW])
@pytest.mark.parametrize("affine", LEARNABLE)
def test_twenty_steps_shared_and_unshared_stay_together(optimizer: Callable[..., Any], affine: str) -> None:
    batches = torch.randn(20, *IMAGES)
    results = []
    for fold in ("always", "never"):
        torch.manual_seed(0)
        model = frozen(Plain(), affine, fold)
        steps = optimizer(model.parameters())
        for x in batches:
            steps.zero_grad()
            F.cross_entropy(model(x), torch.arange(4)).backward()
            steps.step()
        results.append(model.state_dict())
    start = settle(Plain()).state_dict()
    assert not torch.equal(results[0]["conv1.weight"], start["conv1.weight"])
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [4, 96], ids=["small weight", "large weight"])
def test_under_autocast_the_error_is_that_of_the_unshared_layer(channels: int) -> None:
    """Of a large weight autocast's copy is not kept: it is made again from the Parameter."""
    x = torch.randn(32, channels, 8, 8)
    model = frozen(nn.Sequential(nn.Conv2d(channels, 96, 3, bias=False), nn.BatchNorm2d(96), nn.Conv2d(96, 4, 3)))
    exact = step(copy.deepcopy(model).double(), x.double())[1]
    errors: dict[str, float] = {}
    for fold in ("always", "never"):
        set_fold(model, fold)
        with torch.autocast("cpu", torch.bfloat16):
            assert sharing(model, x) == [fold == "always"]
            y, gradients = step(model, x)
        assert y.dtype == torch.bfloat16
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
        errors[fold] = sum(float((g.double() - exact[n]).norm() / exact[n].norm()) for n, g in gradients.items())
    assert errors["always"] <= 1.2 * errors["never"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_memory_format_are_kept(layout: torch.memory_format, dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 8, 8).to(dtype).contiguous(memory_format=layout).requires_grad_()
    model = frozen(PAIRS["conv2d"][0](False).to(dtype).to(memory_format=layout))  # type: ignore[call-overload]
    y = model(x)
    y.backward(torch.ones_like(y))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=layout)
    assert model[0].weight.grad.is_contiguous(memory_format=layout)  # type: ignore[index, union-attr]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_weight_in_either_memory_format_is_shared_with(layout: torch.memory_format) -> None:
    gamma, x = torch.ones(4, requires_grad=True), torch.randn(IMAGES)
    conv = nn.Conv2d(3, 4, 3).to(memory_format=layout)  # type: ignore[call-overload]
    assert producer_of(conv(x), gamma, "always") is not None
    volume = nn.Conv3d(3, 4, 3)
    volume.weight.data = volume.weight.data.contiguous(
        memory_format=torch.channels_last_3d if layout is torch.channels_last else layout
    )
    assert producer_of(volume(torch.randn(2, 3, 4, 4, 4)), gamma, "always") is not None
    # The elements of a channel do not lie together here, and a kernel could not take them as rows.
    crossed = nn.Conv2d(3, 4, 3)
    crossed.weight.data = crossed.weight.data.transpose(2, 3)
    assert producer_of(crossed(x), gamma, "always") is None


# Memory, and when it pays


def net(*norms: nn.Module) -> nn.Module:
    convs = [nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)]
    return nn.Sequential(convs[0], norms[0], nn.ReLU(True), convs[1], norms[1], nn.ReLU(True))


@pytest.mark.parametrize("affine", LEARNABLE)
def test_a_step_keeps_what_the_net_without_norm_layers_keeps(affine: str) -> None:
    x = torch.randn(8, 3, 17, 17)
    bare = net(nn.Identity(), nn.Identity())
    floor = saved_bytes(bare, lambda: bare(x))
    model = frozen(net(nn.BatchNorm2d(16), nn.BatchNorm2d(16)), affine)
    assert saved_bytes(model, lambda: model(x)) <= 1.01 * floor
    set_fold(model, "never")
    assert saved_bytes(model, lambda: model(x)) > 1.5 * floor


def test_fine_tuning_the_norm_alone_keeps_no_more_than_the_convolutions_keep() -> None:
    x = torch.randn(8, 3, 17, 17)
    convs = [nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 16, 3, bias=False)]
    model = frozen(nn.Sequential(convs[0], nn.BatchNorm2d(16), nn.ReLU(True), convs[1], nn.BatchNorm2d(16)))
    for conv in convs:
        conv.requires_grad_(False)
    assert sharing(model, x) == [False, True]  # in front of the first nothing is trained, so nothing is recorded
    shared = saved_bytes(model, lambda: model(x))
    set_fold(model, "never")
    assert shared <= saved_bytes(model, lambda: model(x)) - 4 * 8 * 16 * 13 * 13 + 4 * 64


def test_a_small_result_is_kept_and_a_large_one_shared() -> None:
    model = frozen(nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)), fold="auto")
    assert sharing(model, torch.randn(1, 3, 32, 32)) == [False]
    assert sharing(model, torch.randn(8, 3, 32, 32)) == [True]
    assert fewest(32 * 32 * 32, 864) == 8
    assert pays(1 << 18, 1 << 21)
    assert not pays((1 << 18) - 1, 0)
    assert not pays(1 << 18, (1 << 21) + 1)


@pytest.mark.parametrize("affine", ["none", "shift"])
def test_a_scale_that_is_not_trained_has_nothing_to_share(affine: str) -> None:
    model = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), affine)
    assert sharing(model, torch.randn(IMAGES)) == [False]
    x = torch.randn(64, 3, 9, 9, requires_grad=True)
    conv = model[0]  # type: ignore[index]
    kept_by_conv = saved_bytes(conv, lambda: conv(x))
    assert saved_bytes(model, lambda: model(x)) <= kept_by_conv + 4 * 4


# Where it is switched off


def test_it_shares_only_with_a_convolution_that_nothing_came_behind() -> None:
    gamma = torch.ones(4, requires_grad=True)
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(IMAGES)
    assert producer_of(conv(x), gamma, "always") is not None
    y = conv(x)
    y.retain_grad()
    hooked = conv(x)
    hooked.register_hook(lambda grad: grad)
    with torch.no_grad():
        written = nn.Conv2d(3, 4, 3)(x)
    written = conv(x)
    with torch.no_grad():
        written.mul_(2)
    others = {
        "its gradient is kept": y,
        "a hook on it": hooked,
        "written to": written,
        "changed in place": conv(x).mul_(2),
        "an activation": conv(x).relu(),
        "a view": conv(x)[:, :, 1:],
        "transposed": nn.ConvTranspose2d(3, 4, 3)(x),
        "a leaf": torch.randn(4, 4, 3, 3, requires_grad=True),
        "no gradients": conv(x).detach(),
    }
    assert [name for name, z in others.items() if producer_of(z, gamma, "always") is not None] == []
    assert producer_of(conv(x), gamma, "never") is None
    assert producer_of(conv(x), None, "always") is None
    assert producer_of(conv(x), gamma.detach(), "always") is None
    with torch.no_grad():
        assert producer_of(conv(x), gamma, "always") is None


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    x = torch.randn(IMAGES)
    model = frozen(Residual())
    expected = step(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    y, gradients = step(compiled, x)  # type: ignore[arg-type]
    torch.testing.assert_close(y, expected[0])
    for name, grad in gradients.items():
        torch.testing.assert_close(grad, expected[1][name.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    x = torch.randn(IMAGES)
    model = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3)))
    expected = step(model, x)[1]
    weights = torch.randn(4, 4, 5, 5, generator=torch.Generator().manual_seed(3))
    for run in (
        lambda x: checkpoint(model, x, use_reentrant=reentrant),
        lambda x: checkpoint_sequential(model, 4, x, use_reentrant=reentrant),
    ):
        model.zero_grad(set_to_none=True)
        (run(x.clone().requires_grad_()) * weights).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_activations_kept_on_the_cpu_or_packed_are_fetched_once() -> None:
    model, x = frozen(Residual()), torch.randn(IMAGES)
    expected = step(model, x)
    with torch.autograd.graph.save_on_cpu():
        assert_close(step(model, x), expected)
    parked: dict[int, Tensor] = {}

    def park(tensor: Tensor) -> int:
        parked[len(parked)] = tensor
        return len(parked) - 1

    taken: list[int] = []

    def fetch(number: int) -> Tensor:
        taken.append(number)
        return parked[number]

    with torch.autograd.graph.saved_tensors_hooks(park, fetch):
        assert_close(step(model, x), expected)
    assert len(set(taken)) == len(taken)


def test_buffers_written_to_between_forward_and_backward_do_no_harm() -> None:
    model, x = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()), torch.randn(IMAGES).double()
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    y = model(x).square().sum()
    model[1].running_mean.fill_(5.0)  # type: ignore[index]
    model[1].running_var.fill_(5.0)  # type: ignore[index]
    torch.testing.assert_close(torch.autograd.grad(y, list(model.parameters())), expected, rtol=0, atol=0)


@pytest.mark.parametrize("affine", ["none", "shift", "merged", "original"])
def test_what_is_known_of_the_constants_is_renewed_when_they_change(affine: str) -> None:
    def changes(model: nn.Module) -> dict[str, Callable[[], Any]]:
        norm = model[1]  # type: ignore[index]
        other = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double(), seed=7).state_dict()
        return {
            "load_state_dict": lambda: model.load_state_dict(other),
            "a loaded tensor in its place": lambda: model.load_state_dict(copy.deepcopy(other), assign=True),
            "an average that writes to the state dict": lambda: [
                v.mul_(1.5) for k, v in model.state_dict().items() if k.startswith("1.running")
            ],
            "a write through .data": lambda: norm.running_var.data.mul_(2),
            "a write through numpy": lambda: norm.running_mean.numpy().fill(0.5),
            "a copy in place": lambda: norm.running_var.copy_(norm.running_var * 2),
            "a cast": lambda: model.float(),
            "another tensor": lambda: setattr(norm, "running_mean", norm.running_mean + 1),
        }

    for name in changes(frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double())):
        model = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double(), affine)
        step(model, torch.randn(IMAGES).double())
        changes(model)[name]()
        x = torch.randn(IMAGES).to(model[0].weight)  # type: ignore[index]
        known = step(model, x)
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm):
                module.__dict__["_constants"] = type(module._constants)()
        fresh = step(model, x)
        for key, value in fresh[1].items():
            assert torch.equal(known[1][key], value), (name, key)


class Branches(nn.Module):
    """One convolution, whose weight is large enough that autocast's copy of it is not kept, and two norm layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 96, 1), nn.Conv2d(96, 96, 3, padding=1, bias=False)
        self.one, self.two = nn.BatchNorm2d(96), nn.BatchNorm2d(96)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        return self.one(y) + 2 * self.two(y)  # type: ignore[no-any-return]


def test_two_layers_on_one_convolution_share_under_autocast_too() -> None:
    x = torch.randn(4, 3, 8, 8)
    found = []
    for fold, dtype in (("always", torch.float32), ("never", torch.float32), ("never", torch.float64)):
        model = frozen(Branches(), fold=fold).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            found.append(step(model, x.to(dtype))[1])
    shared, apart, exact = found
    for name, reference in exact.items():
        size = reference.norm()
        assert (shared[name] - reference).norm() / size <= 1.2 * (apart[name] - reference).norm() / size + 1e-3, name


def test_under_autocast_a_weight_written_to_before_backward_is_an_error_and_no_wrong_gradient() -> None:
    model = frozen(Branches())
    held: list[Tensor] = []
    model.conv.register_forward_hook(lambda m, a, y: held.append(y))  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 3, 8, 8))
    with torch.no_grad():
        model.conv.weight.mul_(3)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held[0].sum().backward()


def test_under_autocast_who_holds_the_output_of_a_convolution_gets_the_gradients_of_the_unshared_layer() -> None:
    x, found = torch.randn(4, 3, 8, 8), []
    for fold in ("always", "never"):
        torch.manual_seed(0)
        model = frozen(Branches(), fold=fold)
        held: list[Tensor] = []
        model.conv.register_forward_hook(lambda m, a, y, held=held: held.append(y))  # type: ignore[union-attr, misc]
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        held[0].float().square().mean().backward(retain_graph=True)
        of_held = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        (y.float().square().mean() + held[0].float().square().mean()).backward()
        found.append((of_held, {name: p.grad for name, p in model.named_parameters()}))
    (exact, of_all), (expected, expected_of_all) = found
    assert all(torch.equal(exact[name], grad) for name, grad in expected.items())
    assert exact.keys() == expected.keys() == {"stem.weight", "stem.bias", "conv.weight"}
    for name, grad in expected_of_all.items():
        torch.testing.assert_close(of_all[name], grad, rtol=0.02, atol=0.02 * float(grad.abs().max()))


def test_a_norm_of_lower_precision_than_the_convolution_is_left_to_autograd() -> None:
    model, x = frozen(Branches()), torch.randn(4, 3, 8, 8)
    for norm in (model.one, model.two):
        norm.bfloat16()  # type: ignore[union-attr, operator]
    with torch.autocast("cpu", torch.bfloat16):
        shared = sharing(model, x)
        _, gradients = step(model, x)
    assert shared == [False, False]
    assert all(torch.isfinite(grad).all() for grad in gradients.values())


def test_an_input_written_to_behind_the_convolution_is_no_error_where_no_backward_pass_comes() -> None:
    model = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(IMAGES)
    expected = model(x)
    y = model[0](x)  # type: ignore[index]
    x.add_(1)
    z = model[1](y)  # type: ignore[index]
    assert torch.equal(z, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("affine", ["none", "shift", "merged", "original"])
def test_statistics_that_were_made_in_inference_mode_can_be_trained_on(affine: str) -> None:
    model, x = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), affine), torch.randn(IMAGES)
    expected = step(model, x)
    with torch.inference_mode():
        for name in ("running_mean", "running_var"):
            setattr(model[1], name, getattr(model[1], name) * 1)  # type: ignore[index]
    assert_close(step(model, x), expected)
    with torch.inference_mode():
        model[1].running_var.mul_(4)  # type: ignore[index, union-attr, operator]
    assert not torch.equal(step(model, x)[0], expected[0])


@pytest.mark.parametrize("affine", ["none", "shift", "merged", "original"])
@pytest.mark.parametrize("fold", ["always", "never"])
def test_an_empty_batch_has_gradients_of_zero(affine: str, fold: str) -> None:
    """PyTorch's CPU kernel divides by zero there, and the process is gone (SIGFPE)."""
    model = frozen(Residual(), affine, fold)
    _, gradients = step_of_none(model)
    assert gradients
    assert all(not grad.any() for grad in gradients.values())


def step_of_none(model: nn.Module) -> Outcome:
    y = model(torch.randn(0, *IMAGES[1:], requires_grad=True))
    y.sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_vectorized_jacobian_is_that_of_batch_norm_in_eval_mode() -> None:
    x = torch.randn(1, *IMAGES[1:]).double()
    vanilla = settle(Residual()).double().eval()
    for fold in ("always", "never"):
        model = frozen(copy.deepcopy(vanilla), fold=fold)
        found, expected = (
            torch.autograd.functional.jacobian(lambda x, net=net: net(x).mean((0, 2, 3)), x, vectorize=vectorize)
            for net, vectorize in ((model, True), (vanilla, False))
        )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_what_is_known_for_one_replica_stays_so_when_another_asks() -> None:
    constants = Constants()
    one, two = (torch.full((3,), value) for value in (1.0, 2.0))
    known = constants.of(one, one, 0.0)
    other = constants.of(two, two, 0.0)
    assert known.mean.tolist() == [1.0] * 3
    assert other.mean.tolist() == [2.0] * 3


@pytest.mark.parametrize("fold", ["always", "never"])
def test_make_fx_traces_a_training_step(fold: str) -> None:
    x, y = torch.randn(IMAGES).double(), torch.randn(IMAGES).double()
    model = frozen(Residual(), fold=fold).double()
    parameters = list(model.parameters())

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x).square().sum(), parameters)

    traced = make_fx(gradients)(x)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(tuple(traced(y)), gradients(y), rtol=1e-10, atol=1e-10)
