"""Whoever looks at a network in training sees what is there without shared backward passes.

After reports on Grad-CAM over a convolution (jacobgil/pytorch-grad-cam), losses on the inputs of BatchNorm
(DeepInversion), per-sample gradients (opacus), features before a neck's BatchNorm (re-identification baselines),
LoRA on convolutions (peft), eager quantization-aware training and pickled parts of models.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.layers.frozen import AFFINE_KINDS, FrozenBatchNorm
from tests.models import settle
from tests.tools import saved_bytes

timm = pytest.importorskip("timm")
NETS = ("test_resnet", "test_efficientnet", "test_byobnet", "mobilenetv3_small_050", "resnet10t")
SEEN = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, FrozenBatchNorm)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return settle(make())


def watched(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SEEN))


class Observer:
    """Keeps what hooks on all convolutions and norm layers see; gradients too, where `gradients` says how."""

    def __init__(self, model: nn.Module, gradients: str) -> None:
        self.seen: dict[str, Tensor] = {}
        self.features: dict[str, Tensor] = {}
        for name, module in watched(model):
            module.register_forward_pre_hook(self.pre(name))
            module.register_forward_hook(self.post(name, gradients))
            if gradients == "full backward hooks" and isinstance(module, nn.Conv2d):
                module.register_full_backward_hook(self.backward(name))

    def pre(self, name: str) -> Callable[..., None]:
        return lambda module, args: self.seen.__setitem__(f"{name} in", args[0].detach().clone())

    def post(self, name: str, gradients: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.seen[f"{name} out"] = output.detach().clone()
            if output.requires_grad and gradients in ("kept at once", "asked for later"):
                self.features[name] = output
            if output.requires_grad and gradients == "kept at once":
                output.retain_grad()
            if output.requires_grad and gradients == "tensor hooks":
                output.register_hook(lambda grad: self.seen.__setitem__(f"{name} grad", grad.clone()))

        return hook

    def backward(self, name: str) -> Callable[..., None]:
        return lambda module, of_input, of_output: self.seen.__setitem__(f"{name} grad", of_output[0].clone())


def look(
    net: str, affine: str, fold: str, images: int, *, gradients: str = "", train: bool = True, before: bool = True
) -> dict[str, Tensor]:
    """Return all that observers see of one step, hooked before or after the conversion."""
    model = seeded(lambda: timm.create_model(net, num_classes=5))
    observer = Observer(model, gradients) if before else None
    model = fbn.convert(model, fbn.Freeze(affine, fold=fold), verify=False)  # type: ignore[arg-type]
    observer = observer or Observer(model, gradients)
    model.train(train)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    x = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    loss = model(x).square().mean()
    if gradients == "asked for later":
        found = torch.autograd.grad(loss, list(observer.features.values()))
        observer.seen |= {f"{name} grad": grad for name, grad in zip(observer.features, found, strict=True)}
    elif gradients:
        loss.backward()
        kept = ((name, y.grad) for name, y in observer.features.items())
        observer.seen |= {f"{name} grad": grad for name, grad in kept if grad is not None}
        observer.seen |= {f"{n} parameter": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return observer.seen


def assert_same_sight(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if "grad" in name or "parameter" in name:
            assert (actual[name] - value).abs().max() <= 1e-5 * value.abs().max().clamp_min(1e-6), name
        else:
            assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("affine", AFFINE_KINDS)
def test_hooks_see_the_same_tensors_before_and_after_conversion_in_both_modes_and_at_any_batch(
    net: str, affine: str
) -> None:
    for images in (1, 8):
        for train in (True, False):
            expected = look(net, affine, "never", images, train=train)
            for before in (True, False):
                assert_same_sight(look(net, affine, "always", images, train=train, before=before), expected)
    with torch.no_grad():
        assert_same_sight(look(net, affine, "always", 8), look(net, affine, "never", 8))


# With full backward hooks PyTorch itself refuses what works in place behind a convolution, as in the other two nets.
ASKING = [(net, kind) for net in NETS[:3] for kind in ("kept at once", "asked for later", "tensor hooks")]


@pytest.mark.parametrize(("net", "gradients"), [*ASKING, ("test_resnet", "full backward hooks")])
def test_gradients_of_a_convolutions_output_are_there_for_who_asks(net: str, gradients: str) -> None:
    for affine in ("merged", "original"):
        expected = look(net, affine, "never", 4, gradients=gradients)
        assert any(name.endswith("grad") for name in expected)
        assert_same_sight(look(net, affine, "always", 4, gradients=gradients), expected)


def test_an_observer_in_compiled_code_sees_the_same() -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        )

    x = torch.randn(4, 3, 32, 32)
    sights = []
    for fold in ("always", "never"):
        model = seeded(net)
        model = fbn.convert(model, fbn.Freeze("original", fold=fold), verify=False)  # type: ignore[arg-type]
        observer = Observer(model, "")
        torch._dynamo.reset()
        torch.compile(model, backend="aot_eager")(x).sum().backward()
        sights.append(observer.seen | {f"{n} parameter": p.grad for n, p in model.named_parameters()})  # type: ignore[dict-item]
    assert_same_sight(*sights)


def test_grad_cam_over_a_convolution_gives_one_heat_map_at_any_batch_size() -> None:
    """jacobgil/pytorch-grad-cam: the target layer's output is kept by a hook, its gradient by a hook on the tensor."""
    images = torch.randn(8, 3, 64, 64)

    def heat_map(fold: str, batch: Tensor) -> Tensor:
        model = seeded(lambda: timm.create_model("test_resnet", num_classes=5))
        model = fbn.convert(model, fbn.Freeze("original", fold=fold), verify=False)  # type: ignore[arg-type]
        kept: dict[str, Tensor] = {}

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            kept["feature"] = output
            output.register_hook(lambda grad: kept.__setitem__("grad", grad))

        model.layer4[0].conv1.register_forward_hook(keep)
        model(batch)[:, 0].sum().backward()
        weights = kept["grad"].mean((2, 3), keepdim=True)
        return (weights * kept["feature"]).sum(1).relu()[0].detach()

    expected = heat_map("never", images[:1])
    for fold in ("auto", "always"):
        for batch in (1, 2, 8):
            torch.testing.assert_close(heat_map(fold, images[:batch]), expected, rtol=1e-5, atol=1e-6)


class Neck(nn.Module):
    """Returns in training the feature in front of its norm as well: a triplet loss takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Any:
        feature = self.conv(x)
        z = F.relu_(self.bn(feature))
        return (z, feature) if self.training else z


@pytest.mark.parametrize("reader", ["a loss", "its gradient", "both"])
def test_a_neck_that_reads_the_feature_in_training_only_gets_it_and_its_gradient(reader: str) -> None:
    found = []
    for fold in ("always", "never"):
        model = seeded(Neck).double().train()
        fbn.convert(model, fbn.Freeze("original", fold=fold), verify=False)  # type: ignore[arg-type]
        model.train()
        z, feature = model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double())
        if reader != "a loss":
            feature.retain_grad()
        loss = z.square().sum() + (0 if reader == "its gradient" else feature.abs().sum())
        value = feature.detach().clone()
        if reader == "a loss":
            del feature
        loss.backward()
        found.append([value, *(p.grad for p in model.parameters())] + ([feature.grad] if reader != "a loss" else []))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def hooked(kind: str, when: str, fold: str, twice: bool) -> list[Any]:
    """Return what hooks on a convolution's output that nobody holds see of a step, and the gradients."""
    seen: list[Any] = []

    class Hooked(Neck):
        def forward(self, x: Tensor) -> Tensor:
            feature = self.conv(x)

            def put() -> None:
                keep = lambda *grads: seen.append(torch.utils._pytree.tree_leaves(grads))  # noqa: E731
                if kind == "tensor":
                    feature.register_hook(keep)
                elif kind == "tensor, doubling":
                    feature.register_hook(lambda grad: 2 * grad)
                elif kind == "several tensors":
                    torch.autograd.graph.register_multi_grad_hook((feature,), keep)
                elif kind == "node":
                    feature.grad_fn.register_hook(keep)
                elif kind == "node, before":
                    feature.grad_fn.register_prehook(keep)

            if when == "before":
                put()
            z = self.bn(feature)
            if when == "after":
                put()
            return z  # type: ignore[no-any-return]

    model = seeded(Hooked).double()
    fbn.convert(model, fbn.Freeze("original", fold=fold), verify=False)  # type: ignore[arg-type]
    if kind == "module, of old":
        model.conv.register_backward_hook(lambda m, gi, go: seen.append([*gi, *go]))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    loss = model.train()(x).square().sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=twice)
    if twice:
        gradients += torch.autograd.grad(sum(g.square().sum() for g in gradients), list(model.parameters()))
    return [[g for saw in seen for g in saw if g is not None], gradients]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "kind", ["tensor", "tensor, doubling", "several tensors", "node", "node, before", "module, of old"]
)
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_hooks_put_on_a_result_that_nobody_holds_see_its_gradient(kind: str, when: str) -> None:
    """The Grad-CAM of many tutorials: `h = features.register_hook(...)` in forward, before or after the norm layer."""
    for twice in (False, True):
        expected = hooked(kind, when, "never", twice)
        assert expected[0] or kind == "tensor, doubling"
        if twice and when == "after" and kind != "module, of old":
            with pytest.raises(RuntimeError, match="before the layer runs"):
                hooked(kind, when, "always", twice)
        else:
            torch.testing.assert_close(hooked(kind, when, "always", twice), expected, rtol=1e-9, atol=1e-9)


def test_under_foreign_saved_tensor_hooks_a_gradient_asked_for_later_is_there() -> None:
    model = seeded(Neck).double().train()
    fbn.convert(model, fbn.Freeze("original", fold="always"), verify=False)
    packs: list[tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = [
        (torch.Tensor.clone, torch.Tensor.clone),
        (lambda t: t, lambda t: t),
    ]
    for pack, unpack in packs:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            z, feature = model.train()(torch.randn(2, 3, 8, 8).double())
        feature.retain_grad()
        z.sum().backward()
        scale = model.bn.weight / (model.bn.running_var + model.bn.eps).sqrt()
        assert feature.grad is not None
        torch.testing.assert_close(feature.grad, ((z > 0) * scale.view(-1, 1, 1)).to(z))


def test_in_place_operations_behind_a_layer_or_on_its_input_are_as_without() -> None:
    class Adds(nn.Module):
        def __init__(self, where: str) -> None:
            super().__init__()
            self.conv, self.bn, self.where = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), where

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            if self.where == "in front":
                y += x
            z = self.bn(y)
            if self.where == "behind":
                z += x
                z.relu_()
            return z

    for where in ("in front", "behind"):
        found = []
        for fold in ("always", "never"):
            model = seeded(lambda where=where: Adds(where)).double()  # type: ignore[misc]
            fbn.convert(model, fbn.Freeze("original", fold=fold), verify=False)  # type: ignore[arg-type]
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
            found.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_a_convolutions_output_that_is_held_and_written_to_is_autograds_error() -> None:
    model = settle(Neck().train())
    fbn.convert(model, fbn.Freeze("original", fold="always"), verify=False)
    z, feature = model.train()(torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        feature.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


# What else could be seen


@pytest.mark.parametrize("affine", AFFINE_KINDS)
def test_nothing_but_norm_layers_changes_its_class_its_attributes_or_its_pickle(affine: str) -> None:
    model = settle(timm.create_model("test_resnet"))
    rest = {name: module for name, module in model.named_modules() if "BatchNorm" not in type(module).__name__}
    before = {
        n: (type(m), set(vars(m)), len(pickle.dumps(m)) if not list(m.children()) else 0) for n, m in rest.items()
    }
    fbn.convert(model, fbn.Freeze(affine, fold="always"))  # type: ignore[arg-type]
    model(torch.randn(8, 3, 32, 32)).sum().backward()
    model.zero_grad(set_to_none=True)
    now = dict(model.named_modules())
    for name, (kind, attributes, size) in before.items():
        assert now[name] is rest[name]
        assert type(now[name]) is kind
        assert set(vars(now[name])) == attributes
        if size:
            assert len(pickle.dumps(now[name])) == size


def test_a_layer_and_a_model_are_pickled_and_copied_without_what_they_lean_on() -> None:
    model = settle(timm.create_model("test_resnet"))
    fbn.convert(model, fbn.Freeze("original", fold="always"))
    x = torch.randn(4, 3, 32, 32)
    alone = len(pickle.dumps(model.bn1))
    expected = model(x)
    expected.sum().backward()
    assert len(pickle.dumps(copy.deepcopy(model.bn1))) <= alone + 2 * 4 * 32 + 256  # the two gradients
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), expected)
        assert saved_bytes(twin, lambda twin=twin: twin(x)) == saved_bytes(model, lambda: model(x))  # type: ignore[misc]


def test_a_convolution_that_is_wrapped_or_parametrized_later_works_and_reverts() -> None:
    """peft's LoRA makes `type(conv)(...)`; a parametrization changes the class and the weight."""
    x = torch.randn(4, 3, 32, 32)
    model = settle(timm.create_model("test_resnet"))
    vanilla = copy.deepcopy(model).eval()
    fbn.convert(model, fbn.Freeze("original", fold="always"))
    conv = model.layer1[0].conv1
    twin = type(conv)(conv.in_channels, 4, 1)
    assert type(twin) is type(conv)
    nn.utils.parametrizations.weight_norm(conv)
    model(x).sum().backward()
    assert conv.parametrizations.weight.original0.grad is not None
    fbn.revert(model)
    torch.testing.assert_close(model.eval()(x), vanilla(x), rtol=1e-4, atol=1e-4)


def test_eager_quantization_aware_training_finds_all_convolutions() -> None:
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    fbn.convert(model, fbn.Freeze("original", fold="always"))
    quantization = torch.ao.quantization
    model.train().qconfig = quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
    prepared = quantization.prepare_qat(model)
    found = [type(module) for module in prepared.modules() if isinstance(module, nn.Conv2d)]
    assert found == [torch.ao.nn.qat.Conv2d] * 2
