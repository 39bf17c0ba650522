"""Folded layers: the same numbers as in activation space, and what must not part a producer from its layer."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import finetune_bn as fbn
from finetune_bn.errors import FinetuneBNError
from finetune_bn.layers.folded import FoldedConv2d
from finetune_bn.layers.folds import folds_in, unfolded
from finetune_bn.layers.frozen import AFFINE_KINDS
from tests.models import Plain, settle
from tests.tools import assert_same_state, saved_bytes

IMAGES = (4, 3, 9, 9)


class Residual(nn.Module):
    """conv - BN - ReLU - conv - BN, added to a projection with a BN of its own."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=inplace)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(y + self.shortcut(x))


def folded(model: nn.Module, affine: str = "original", x: Tensor | None = None) -> nn.Module:
    """Return the model, settled and with all that can be folded folded."""
    x = torch.randn(IMAGES) if x is None else x
    converted = fbn.convert(settle(model), fbn.Freeze(affine, fold="always"), example_input=x)  # type: ignore[arg-type]
    assert folds_in(converted)
    return converted


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return output and gradients by name of one training step's forward and backward; the input's is "x"."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    (y * weights).sum().backward()
    assert x.grad is not None
    return y.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}


def assert_close(actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    tolerance = 1e-10 if expected[0].dtype == torch.float64 else 1e-5
    assert actual[1].keys() == expected[1].keys()
    for name, reference in {"output": expected[0], **expected[1]}.items():
        got = actual[0] if name == "output" else actual[1][name]
        off = float((got - reference).abs().max() / reference.abs().max())
        assert off <= tolerance, f"{name}: {off:.2g}"


def same_as_unfolded(model: nn.Module, x: Tensor) -> None:
    """Assert that the model computes what it computes in activation space, in outputs and gradients."""
    with unfolded(model):
        expected = step(model, x)
    assert_close(step(model, x), expected)


# Equality


PAIRS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda b: nn.Sequential(nn.Linear(5, 6, bias=b), nn.BatchNorm1d(6)), (7, 5)),
    "conv1d": (lambda b: nn.Sequential(nn.Conv1d(4, 6, 3, bias=b), nn.BatchNorm1d(6)), (3, 4, 8)),
    "conv2d": (lambda b: nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, bias=b), nn.BatchNorm2d(6)), (3, 4, 8, 7)),
    "conv3d": (lambda b: nn.Sequential(nn.Conv3d(4, 6, 2, bias=b), nn.BatchNorm3d(6)), (2, 4, 4, 4, 4)),
    "transposed1d": (lambda b: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, bias=b), nn.BatchNorm1d(6)), (3, 4, 8)),
    "transposed2d": (
        lambda b: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2, bias=b), nn.BatchNorm2d(6)
        ),
        (3, 4, 5, 5),
    ),
    "transposed3d": (lambda b: nn.Sequential(nn.ConvTranspose3d(4, 6, 2, bias=b), nn.BatchNorm3d(6)), (2, 4, 3, 3, 3)),
    "grouped": (lambda b: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=b), nn.BatchNorm2d(6)), (3, 4, 6, 6)),
    "depthwise": (lambda b: nn.Sequential(nn.Conv2d(6, 6, 3, groups=6, bias=b), nn.BatchNorm2d(6)), (3, 6, 6, 6)),
    "dilated": (lambda b: nn.Sequential(nn.Conv2d(4, 6, 3, dilation=2, bias=b), nn.BatchNorm2d(6)), (3, 4, 8, 8)),
    "same": (lambda b: nn.Sequential(nn.Conv2d(4, 6, (2, 3), padding="same", bias=b), nn.BatchNorm2d(6)), (3, 4, 6, 6)),
    "valid": (lambda b: nn.Sequential(nn.Conv2d(4, 6, 3, padding="valid", bias=b), nn.BatchNorm2d(6)), (3, 4, 6, 6)),
    "circular": (
        lambda b: nn.Sequential(nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular", bias=b), nn.BatchNorm2d(6)),
        (3, 4, 6, 6),
    ),
    "small result": (lambda b: nn.Sequential(nn.Conv2d(9, 6, 3, bias=b), nn.BatchNorm2d(6)), (2, 9, 4, 4)),
    "small linear": (lambda b: nn.Sequential(nn.Linear(9, 6, bias=b), nn.BatchNorm1d(6)), (2, 9)),
}


@pytest.mark.parametrize("affine", AFFINE_KINDS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("pair", PAIRS)
def test_outputs_and_gradients_are_those_of_activation_space(pair: str, bias: bool, affine: str) -> None:
    make, shape = PAIRS[pair]
    for dtype in (torch.float64, torch.float32):
        x = torch.randn(shape, dtype=dtype)
        same_as_unfolded(folded(make(bias).to(dtype), affine, x), x)


def test_conv_same_of_timm_is_folded_with_its_padding() -> None:
    layers = pytest.importorskip("timm.layers")
    for kernel, stride, size in ((3, 2, 8), (5, 2, 9), (3, 1, 7), (2, 3, 8)):
        model = nn.Sequential(layers.Conv2dSame(3, 6, kernel, stride=stride), layers.BatchNormAct2d(6)).double()
        x = torch.randn(2, 3, size, size + 1, dtype=torch.float64)
        same_as_unfolded(folded(model, x=x), x)
        assert type(fbn.revert(model)[0]) is layers.Conv2dSame  # type: ignore[index]


@pytest.mark.parametrize("what", ["the weight", "gamma", "all but the input", "nothing but the input"])
def test_only_what_is_trained_gets_a_gradient(what: str) -> None:
    make, shape = PAIRS["conv2d"]
    x = torch.randn(shape, dtype=torch.float64)
    model = folded(make(True).double(), x=x)
    conv, bn = model[0], model[1]  # type: ignore[index]
    conv.requires_grad_(what in ("the weight", "all but the input"))
    bn.requires_grad_(what in ("gamma", "all but the input"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    x.requires_grad_(what == "nothing but the input")
    wanted = [*parameters, *([x] if x.requires_grad else [])]
    actual = torch.autograd.grad(model(x).square().sum(), wanted)
    with unfolded(model):
        expected = torch.autograd.grad(model(x).square().sum(), wanted)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_second_derivatives_are_those_of_activation_space() -> None:
    x = torch.randn(IMAGES, dtype=torch.float64, requires_grad=True)
    model = folded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh()).double(), x=x.detach())

    def penalty() -> tuple[Tensor, ...]:
        wanted = [x, *model.parameters()]
        first = torch.autograd.grad(model(x).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)  # type: ignore[arg-type]

    actual = penalty()
    with unfolded(model):
        torch.testing.assert_close(actual, penalty(), rtol=1e-10, atol=1e-10)


def test_per_sample_gradients_by_vmap_are_those_of_activation_space() -> None:
    x = torch.randn(IMAGES, dtype=torch.float64)
    model = folded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double(), x=x)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    actual = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    with unfolded(model):
        expected = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_without_autograd_the_numbers_are_those_of_batch_norm_bit_for_bit() -> None:
    x = torch.randn(IMAGES)
    vanilla = settle(Residual()).eval()
    model = folded(copy.deepcopy(vanilla), x=x)
    with torch.no_grad():
        assert torch.equal(model(x), vanilla(x))
        assert torch.equal(model.conv1(x), vanilla.conv1(x))
    with torch.inference_mode():
        assert torch.equal(model(x), vanilla(x))


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.01, momentum=0.9), torch.optim.AdamW])
@pytest.mark.parametrize("affine", ["merged", "original"])
def test_twenty_steps_folded_and_unfolded_stay_together(optimizer: Callable[..., Any], affine: str) -> None:
    batches = torch.randn(20, *IMAGES)
    results = []
    for fold in ("always", "never"):
        torch.manual_seed(0)
        model = fbn.convert(settle(Plain()), fbn.Freeze(affine, fold=fold), example_input=batches[0])  # type: ignore[arg-type]
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


@pytest.mark.parametrize("pair", PAIRS)
def test_under_autocast_the_error_is_that_of_the_unfolded_layer(pair: str) -> None:
    make, shape = PAIRS[pair]
    shape = (64, *shape[1:])
    x = torch.randn(shape)
    model = folded(make(True), x=x)
    exact = step(copy.deepcopy(model).double(), x.double())

    def error() -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            y, gradients = step(model, x)
        assert y.dtype == torch.bfloat16
        pairs = {"output": (y, exact[0])} | {name: (g, exact[1][name]) for name, g in gradients.items()}
        return {name: float((a.double() - b).norm() / b.norm()) for name, (a, b) in pairs.items()}

    ours = error()
    with unfolded(model):
        theirs = error()
    for name, value in theirs.items():
        assert ours[name] <= 1.2 * value + 1e-3, (name, ours[name], value)
    assert sum(ours.values()) <= 1.2 * sum(theirs.values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_memory_format_are_kept(layout: torch.memory_format, dtype: torch.dtype) -> None:
    make, _ = PAIRS["conv2d"]
    x = torch.randn(2, 4, 8, 8).to(dtype).contiguous(memory_format=layout).requires_grad_()
    model = folded(make(False).to(dtype).to(memory_format=layout), x=x.detach())  # type: ignore[call-overload]
    y = model(x)
    y.backward(torch.ones_like(y))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=layout)


# Memory


def test_a_step_keeps_what_the_net_without_norm_layers_keeps() -> None:
    x = torch.randn(8, 3, 17, 17)

    def net(*norms: nn.Module) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), norms[0], nn.ReLU(True), nn.Conv2d(16, 16, 3), norms[1], nn.ReLU(True)
        )

    bare = net(nn.Identity(), nn.Identity())
    floor = saved_bytes(bare, lambda: bare(x))
    for affine in AFFINE_KINDS:
        model = folded(net(nn.BatchNorm2d(16), nn.BatchNorm2d(16)), affine, x)
        assert saved_bytes(model, lambda m=model: m(x)) <= 1.01 * floor  # type: ignore[misc]
        with unfolded(model):
            learnable = affine in ("merged", "original")
            assert (saved_bytes(model, lambda m=model: m(x)) > 1.5 * floor) == learnable  # type: ignore[misc]


def test_a_frozen_weight_keeps_no_activation() -> None:
    make, shape = PAIRS["conv2d"]
    model = folded(make(False), "shift", torch.randn(shape))
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    x = torch.randn(64, *shape[1:], requires_grad=True)
    assert saved_bytes(model, lambda: model(x)) < x.nbytes / 10


# What must not part the two


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    x = torch.randn(IMAGES)
    model = folded(Residual())
    with unfolded(model):
        expected = step(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    actual, gradients = step(compiled, x)  # type: ignore[arg-type]
    assert_close((actual, {n.removeprefix("_orig_mod."): g for n, g in gradients.items()}), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected[0])


def test_compiled_code_notices_that_one_of_the_two_was_replaced() -> None:
    x = torch.randn(IMAGES)
    model = folded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    model[0] = nn.Conv2d(3, 4, 3)  # type: ignore[index]
    torch.testing.assert_close(compiled(x), model[1](model[0](x)))  # type: ignore[index]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = folded(Residual())
    x = torch.randn(IMAGES)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    expected = step(model, x)
    y, gradients = step(Checkpointed(), x)
    assert_close((y, {n.removeprefix("inner."): g for n, g in gradients.items()}), expected)
    # Recomputation may stop between the two: neither the next evaluation nor the next step may mind.
    with torch.no_grad():
        model(x)
    assert_close(step(model, x), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_that_part_the_two_give_the_same_gradients_or_an_error(reentrant: bool) -> None:
    x = torch.randn(IMAGES)
    model = folded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3)))
    expected = step(model, x)
    model.zero_grad()
    weights = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(3))
    y = checkpoint_sequential(model, 4, x.requires_grad_(), use_reentrant=reentrant)
    if reentrant:  # the producer runs without autograd first, and with autograd when it is recomputed
        with pytest.raises(FinetuneBNError, match="never went through the second"):
            (y * weights).sum().backward()
        return
    (y * weights).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[1][name], rtol=1e-4, atol=1e-4)


def test_copies_are_folded_and_share_nothing() -> None:
    x = torch.randn(IMAGES)
    model = folded(Residual())
    expected = step(model, x)
    twin = copy.deepcopy(model)
    assert {id(m) for m in twin.modules()}.isdisjoint({id(m) for m in model.modules()})
    assert all(fold.intact and fold.producer in [*twin.modules()] for fold in folds_in(twin))
    assert len(folds_in(twin)) == len(folds_in(model)) == 3
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert_close(step(model, x), expected)
    same_as_unfolded(twin, x)


def test_a_copy_of_one_of_the_two_stands_alone() -> None:
    x = torch.randn(IMAGES, requires_grad=True)
    model = folded(Residual())
    conv, bn = copy.deepcopy(model.conv1), copy.deepcopy(model.bn1)
    with unfolded(model):
        torch.testing.assert_close(conv(x), model.conv1(x))
        torch.testing.assert_close(bn(conv(x)), model.bn1(model.conv1(x)))
    repr(conv)


def test_pickled_whole_models_come_back_folded() -> None:
    x = torch.randn(IMAGES)
    model = folded(Residual())
    expected = step(model, x)
    model(x)  # with results on their way
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert len(folds_in(loaded)) == 3
    assert isinstance(loaded.conv1, FoldedConv2d)
    assert_close(step(loaded, x), expected)
    assert type(fbn.revert(loaded).conv1) is nn.Conv2d


def test_a_model_without_users_is_freed_at_once() -> None:
    model = folded(Residual())
    model(torch.randn(IMAGES)).sum().backward()
    conv = weakref.ref(model.conv1)
    gc.disable()  # by counting references alone: no cycle keeps a GPU's memory
    try:
        del model
        assert conv() is None
    finally:
        gc.enable()


def test_averaged_models_follow() -> None:
    x = torch.randn(IMAGES)
    model = folded(Residual())
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    averages = [averaged.module]
    if timm_utils := pytest.importorskip("timm.utils"):
        ema = timm_utils.ModelEmaV3(model, decay=0.0)
        averages.append(ema.module)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    averaged.update_parameters(model)
    ema.update(model)
    for average in averages:
        assert len(folds_in(average)) == 3
        assert_close(step(average, x), step(model, x))


def test_state_dicts_keep_their_names_and_load_into_folded_models() -> None:
    x = torch.randn(IMAGES)
    vanilla = settle(Residual(), seed=5)
    model = folded(Residual())
    assert model.state_dict().keys() == vanilla.state_dict().keys()
    for assign in (False, True):
        model.load_state_dict(copy.deepcopy(vanilla.state_dict()), strict=True, assign=assign)
        vanilla.eval()
        assert_close(step(model, x), step(vanilla, x))


@pytest.mark.parametrize("affine", AFFINE_KINDS)
def test_revert_takes_everything_back(affine: str) -> None:
    vanilla = settle(Residual())
    before = copy.deepcopy(vanilla.state_dict())
    modules = dict(vanilla.named_modules())
    attributes = {name: set(vars(module)) for name, module in modules.items()}
    model = fbn.revert(folded(vanilla, affine))
    assert dict(model.named_modules()) == modules
    assert {name: set(vars(module)) for name, module in modules.items()} == attributes
    assert {type(m) for m in model.modules()} == {Residual, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Sequential}
    assert_same_state(model.state_dict(), before)


def test_reverting_a_part_leaves_the_rest_folded() -> None:
    x = torch.randn(IMAGES)
    model = folded(Residual())
    fbn.revert(model.shortcut, verify=False)
    assert len(folds_in(model)) == 2
    assert type(model.shortcut[0]) is nn.Conv2d
    same_as_unfolded(model.eval(), x)


def test_another_policy_unties_and_the_same_one_changes_nothing() -> None:
    x = torch.randn(IMAGES)
    model = folded(Residual())
    fbn.convert(model, fbn.Freeze("original", fold="always"))  # without a probe input: what is folded stays folded
    assert len(folds_in(model)) == 3
    fbn.convert(model, fbn.Freeze("shift", fold="never"))
    assert not folds_in(model)
    fbn.convert(model, fbn.Ghost(2))
    assert type(model.conv1) is nn.Conv2d
    fbn.convert(model, fbn.Freeze("merged", fold="always"), example_input=x)
    same_as_unfolded(model, x)


def test_a_conversion_that_fails_leaves_the_model_folded() -> None:
    model = folded(Residual())
    layers = list(model.modules())
    with pytest.raises(FinetuneBNError):
        fbn.convert(model, fbn.Freeze("none"), example_input=torch.randn(1, 5, 9, 9))
    assert list(model.modules()) == layers
    assert len(folds_in(model)) == 3
    assert isinstance(model.conv1, FoldedConv2d)


def test_moves_and_casts_go_along() -> None:
    x = torch.randn(IMAGES)
    model = folded(Residual()).to(torch.float64)
    same_as_unfolded(model, x.double())
    model.to("meta")
    assert model(x.to("meta")).shape == (4, 6, 9, 9)


@pytest.mark.parametrize("other", ["a new conv", "a wrapped conv", "a new norm", "no norm"])
def test_where_one_of_the_two_was_replaced_the_other_does_its_own_part(other: str) -> None:
    x = torch.randn(IMAGES)
    model = folded(Residual())
    with unfolded(model):
        plain = copy.deepcopy(model)
    for net in (model, plain):
        torch.manual_seed(1)
        if "conv" in other:
            net.conv1 = nn.Sequential(net.conv1, nn.Tanh()) if "wrapped" in other else nn.Conv2d(3, 6, 3, padding=1)
        else:
            net.bn1 = nn.Identity() if other == "no norm" else nn.BatchNorm2d(6).eval()
    with unfolded(plain):
        expected = step(plain, x)
    assert_close(step(model, x), expected)


def test_the_layer_alone_and_the_producer_without_autograd_do_their_own_part() -> None:
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    model = folded(Residual())
    with unfolded(model):
        expected = model.bn1(x)
    assert torch.equal(model.bn1(x), expected)
    model(torch.randn(IMAGES)).sum().backward()
    assert torch.equal(model.bn1(x), expected)
    with torch.no_grad():
        y = model.conv1(torch.randn(IMAGES))
    with unfolded(model):
        expected = model.bn1(y)
    assert torch.equal(model.bn1(y), expected)  # the frozen start of a net, run without autograd


def test_the_producer_called_alone_returns_what_the_layer_would_and_the_layer_takes_it() -> None:
    x = torch.randn(IMAGES, requires_grad=True)
    model = folded(Residual())
    with unfolded(model):
        expected = model.bn1(model.conv1(x))
    torch.testing.assert_close(model.conv1(x), expected)
    torch.testing.assert_close(model.bn1(model.conv1(x)), expected)
    same_as_unfolded(model, x)


def test_training_through_the_producer_alone_is_an_error() -> None:
    model = folded(Residual())
    with pytest.raises(FinetuneBNError, match="never went through the second"):
        model.conv1(torch.randn(IMAGES)).sum().backward()


@pytest.mark.parametrize("change", ["another tensor", "in place"])
def test_what_comes_in_between_is_an_error_and_not_scaled_twice(change: str) -> None:
    model = folded(Residual())
    model.conv1.register_forward_hook(lambda m, a, y: 2 * y if change == "another tensor" else (y.mul_(2), None)[1])
    with pytest.raises(FinetuneBNError, match=r"conv1.*bn1.*fold='never'"):
        model(torch.randn(IMAGES))
    with torch.no_grad():
        model(torch.randn(IMAGES))


def test_backward_hooks_of_modules_may_come_in_between() -> None:
    x = torch.randn(IMAGES)
    model = folded(Residual(inplace=False))
    expected = step(model, x)
    seen = []
    for module in (model.conv1, model.bn1):
        module.register_full_backward_hook(lambda m, gx, gy: seen.append(type(m).__name__))
    assert_close(step(model, x), expected)
    assert seen == ["FrozenBatchNorm2d", "FoldedConv2d"]


def test_buffers_written_to_between_forward_and_backward_do_no_harm() -> None:
    x = torch.randn(IMAGES)
    for affine in AFFINE_KINDS:
        model = folded(Residual(), affine)
        y = model(x)
        model.bn1.running_mean.add_(0)  # as DDP's broadcast does
        model.bn1.running_var.add_(0)
        y.sum().backward()


def test_spectral_norm_put_on_a_folded_conv_is_folded_too() -> None:
    x = torch.randn(IMAGES)
    model = folded(Residual())
    nn.utils.parametrizations.spectral_norm(model.conv1)
    same_as_unfolded(model.eval(), x)
