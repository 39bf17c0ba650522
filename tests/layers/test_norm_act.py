"""timm's BatchNorm with an activation and a drop layer: frozen, and turned back."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)

pytest.importorskip("timm")
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from timm.layers.norm_act import SyncBatchNormAct

from finetune_bn.errors import FinetuneBNError, MissingDependency
from finetune_bn.functional.frozen import TOLERANCE
from finetune_bn.layers import (
    FrozenBatchNorm,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    FrozenBatchNormAct2d,
    NoisyFrozenBatchNorm2d,
    NoisyFrozenBatchNormAct2d,
)
from finetune_bn.layers.families import EVAL, FROZEN, GHOST, NOISY, RENORM, STOCHASTIC, Family, class_for, frozen_class
from finetune_bn.layers.frozen import AFFINE_KINDS, Affine
from finetune_bn.layers.norm_act import behind_norm, has_known_forward, is_norm_act
from tests.models import Named, OwnForward, settle
from tests.tools import assert_same_state, without_extra_state


@pytest.fixture(params=AFFINE_KINDS)
def affine(request: pytest.FixtureRequest) -> Affine:
    return request.param


def norm_act(**arguments: Any) -> BatchNormAct2d:
    layer = BatchNormAct2d(4, **{"act_layer": nn.PReLU, "drop_layer": nn.Dropout, **arguments})
    settle(layer)
    if isinstance(layer.act, nn.PReLU):
        nn.init.constant_(layer.act.weight, 0.125)
    return layer.eval()


def images() -> Tensor:
    return torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(2))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[expected.dtype], atol=TOLERANCE[expected.dtype])


@pytest.mark.parametrize("act", [nn.PReLU, nn.ReLU, nn.SiLU, nn.Hardswish])
def test_output_in_eval_mode_is_that_of_timms_layer(affine: Affine, act: type[nn.Module]) -> None:
    layer, x = norm_act(act_layer=act), images()
    frozen = FrozenBatchNormAct2d.from_batch_norm(layer, affine)
    if affine == "merged":
        assert_close(frozen(x), layer(x))
    else:
        assert torch.equal(frozen(x), layer(x))
    # Not idle: the activation does something here.
    assert not torch.allclose(frozen(x), FrozenBatchNorm2d.from_batch_norm(layer, affine)(x))


def test_without_an_activation_nothing_follows(affine: Affine) -> None:
    layer, x = norm_act(apply_act=False, drop_layer=None), images()
    frozen = FrozenBatchNormAct2d.from_batch_norm(layer, affine)
    assert torch.equal(frozen(x), FrozenBatchNorm2d.from_batch_norm(layer, affine)(x))
    assert_close(frozen(x), layer(x))


def test_the_drop_layer_still_follows_the_mode_and_comes_before_the_activation(affine: Affine) -> None:
    frozen, x = FrozenBatchNormAct2d.from_batch_norm(norm_act(act_layer=nn.Sigmoid), affine), images()
    dropped = frozen.train()(x) == 0.5  # sigmoid(0)
    assert 0.3 < dropped.float().mean() < 0.7
    assert not (frozen.eval()(x) == 0.5).any()


def test_act_and_drop_are_the_modules_of_the_source_and_go_back_with_later_changes(affine: Affine) -> None:
    layer = norm_act()
    act, drop = layer.act, layer.drop
    frozen = FrozenBatchNormAct2d.from_batch_norm(layer, affine)
    assert frozen.act is act
    assert frozen.drop is drop
    frozen.act = nn.Tanh()
    back = frozen.to_batch_norm()
    assert isinstance(back.act, nn.Tanh)
    assert back.drop is drop


def test_state_dicts_with_a_trained_activation_load_strictly_both_ways(affine: Affine) -> None:
    layer, x = norm_act(), images()
    frozen = FrozenBatchNormAct2d(4, affine=affine, act=nn.PReLU(), drop=nn.Dropout()).eval()
    frozen.load_state_dict(layer.state_dict(), strict=True)
    assert_close(frozen(x), layer(x))
    back = norm_act()
    back.load_state_dict(frozen.state_dict(), strict=True)
    assert torch.equal(back(x), frozen(x))


def test_an_untouched_layer_turns_back_bit_for_bit(affine: Affine) -> None:
    layer = norm_act()
    frozen = FrozenBatchNormAct2d.from_batch_norm(layer, affine).train()
    back = frozen.to_batch_norm()
    assert back is layer
    assert_same_state(back.state_dict(), norm_act().state_dict())
    assert back.drop.training is True


def test_a_layer_that_was_never_timms_turns_into_timms(affine: Affine) -> None:
    frozen = FrozenBatchNormAct2d(4, eps=1e-3, momentum=None, affine=affine, act=nn.SiLU()).eval()
    back = frozen.to_batch_norm().eval()
    assert type(back) is BatchNormAct2d
    assert (back.eps, back.momentum) == (1e-3, None)
    assert torch.equal(back(images()), frozen(images()))


def test_turning_back_without_timm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.layers.norm_act", None)
    with pytest.raises(MissingDependency, match="pip install timm"):
        FrozenBatchNormAct2d(4).to_batch_norm()


def test_an_unknown_affine_is_one_clear_error() -> None:
    for make in (
        lambda: FrozenBatchNormAct2d(4, affine="gamma"),
        lambda: FrozenBatchNormAct2d.from_batch_norm(norm_act(), "gamma"),
    ):
        with pytest.raises(FinetuneBNError, match="affine: got 'gamma'"):
            make()


def test_timms_synchronized_layer_keeps_its_class_and_activation(affine: Affine) -> None:
    layer, x = convert_sync_batchnorm(norm_act()).eval(), images()
    assert type(layer) is SyncBatchNormAct
    expected = layer(x)
    frozen = frozen_class(layer).from_batch_norm(layer, affine).train()
    frozen.drop.eval()
    assert_close(frozen(x), expected)
    assert frozen.to_batch_norm() is layer


def test_a_layer_that_lost_its_activation_to_torchs_own_conversion_is_frozen_as_it_is() -> None:
    """timm#1254, pytorch#187298: `SyncBatchNorm.convert_sync_batchnorm` makes a plain layer of BatchNormAct2d."""
    broken = nn.SyncBatchNorm.convert_sync_batchnorm(norm_act()).eval()
    x = images()
    if torch.equal(broken(x), norm_act()(x)):
        pytest.skip("this torch keeps the activation")
    frozen = frozen_class(broken).from_batch_norm(broken)
    assert torch.equal(frozen(x), broken(x))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_compiles_without_a_graph_break(affine: Affine, mode: bool) -> None:
    layer = norm_act(act_layer=nn.ReLU, drop_layer=None)
    frozen, x = FrozenBatchNormAct2d.from_batch_norm(layer, affine).train(mode), images()
    torch._dynamo.reset()
    assert torch.equal(torch.compile(frozen, backend="eager", fullgraph=True)(x), frozen(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_torchscript_scripts_and_traces_it(affine: Affine) -> None:
    frozen, x = FrozenBatchNormAct2d.from_batch_norm(norm_act(drop_layer=None), affine), images()
    for module in (torch.jit.script(frozen), torch.jit.trace(frozen, x)):
        assert torch.equal(module(x), frozen(x))


def test_copies_and_files_hold_the_whole_layer(affine: Affine) -> None:
    frozen, x = FrozenBatchNormAct2d.from_batch_norm(norm_act(), affine), images()
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    for other in (copy.deepcopy(frozen), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), frozen(x))
        assert other.to_batch_norm().act is other.act
        assert other.act is not frozen.act


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.BatchNorm1d(4), FrozenBatchNorm1d),
        (nn.BatchNorm2d(4), FrozenBatchNorm2d),
        (nn.BatchNorm3d(4), FrozenBatchNorm3d),
        (nn.SyncBatchNorm(4), FrozenBatchNorm),
        (Named(4), FrozenBatchNorm1d),
        (BatchNormAct2d(4), FrozenBatchNormAct2d),
        (SyncBatchNormAct(4), FrozenBatchNormAct2d),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_each_layer_has_its_frozen_class(layer: nn.Module, expected: type[FrozenBatchNorm]) -> None:
    assert frozen_class(layer) is expected
    assert is_norm_act(layer) == (expected is FrozenBatchNormAct2d)
    assert has_known_forward(layer)


def test_a_forward_of_its_own_is_noticed_in_the_class_and_on_the_instance() -> None:
    patched = nn.BatchNorm2d(4)
    patched.forward = lambda x: x
    assert not has_known_forward(patched)
    assert not has_known_forward(OwnForward(4))


# The layers that track running statistics, and frozen with noise

KINDS: dict[str, tuple[Family[Any], dict[str, Any]]] = {
    "ghost": (GHOST, {"groups": 2}),
    "renorm": (RENORM, {"r_max": 1.2, "d_max": 0.3}),
    "stochastic": (STOCHASTIC, {"p": 0.5}),
    "eval": (EVAL, {"alpha": 0.2}),
    "noisy": (NOISY, {"affine": "original", "noise": 8}),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def pair(kind: str, **arguments: Any) -> tuple[Any, Any]:
    """Return the layer with an activation and the one without, of the same values, each after the same batch."""
    family, settings = KINDS[kind]
    layer, plain = (family[i].from_batch_norm(norm_act(**arguments), **settings).train() for i in (4, 2))
    layer(images())
    plain(images())
    return layer, plain


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", [nn.PReLU, nn.ReLU, nn.SiLU])
def test_the_activation_follows_the_normalization_in_either_mode(kind: str, act: type[nn.Module], mode: bool) -> None:
    layer, plain = pair(kind, act_layer=act, drop_layer=None)
    results = []
    for module, behind in ((layer.train(mode), nn.Identity()), (plain.train(mode), layer.act)):
        torch.manual_seed(1)
        x = images().requires_grad_()
        y = behind(module(x))
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, layer.act.weight] if act is nn.PReLU else [x])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(results[0][0], plain(images()))


def test_what_tracks_statistics_has_drop_before_act_and_gives_them_back(kind: str) -> None:
    source = norm_act(act_layer=nn.Sigmoid)
    act, drop = source.act, source.drop
    family, settings = KINDS[kind]
    layer = family[4].from_batch_norm(source, **settings)
    assert (layer.act, layer.drop) == (act, drop)
    dropped = layer.train()(images()) == 0.5  # sigmoid(0)
    assert 0.3 < dropped.float().mean() < 0.7
    layer.act = nn.Tanh()
    back = layer.to_batch_norm()
    assert back is source
    assert isinstance(back.act, nn.Tanh)
    assert back.drop is drop


def test_what_tracks_statistics_loads_timms_state_dicts_strictly_both_ways(kind: str) -> None:
    layer, _ = pair(kind)
    source = norm_act()
    layer.load_state_dict(source.state_dict(), strict=True)
    state = layer.state_dict()
    assert list(without_extra_state(state)) == list(source.state_dict())
    if kind == "eval":  # computes something else in evaluation, and says so
        with pytest.raises(RuntimeError, match="_extra_state"):
            norm_act().load_state_dict(state, strict=True)
    norm_act().load_state_dict(without_extra_state(state) if kind == "eval" else state, strict=True)


def test_what_never_was_timms_turns_into_timms_and_says_what_to_install(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, settings = KINDS[kind]
    layer = family[4](4, eps=1e-3, momentum=None, act=nn.SiLU(), drop=nn.Dropout(), **settings).eval()
    back = layer.to_batch_norm()
    assert type(back) is BatchNormAct2d
    assert (back.eps, back.momentum) == (1e-3, None)
    assert isinstance(back.act, nn.SiLU)
    monkeypatch.setitem(sys.modules, "timm.layers.norm_act", None)
    with pytest.raises(MissingDependency, match=f"a {type(layer).__name__} turns back .* pip install timm"):
        family[4](4, **settings).to_batch_norm()


def test_timms_synchronized_layer_keeps_its_activation_in_what_tracks_statistics(kind: str) -> None:
    layer = convert_sync_batchnorm(norm_act()).eval()
    family, settings = KINDS[kind]
    stand_in = class_for(layer, family).from_batch_norm(
        layer, **(settings | ({"alpha": 0.0} if kind == "eval" else {}))
    )
    assert type(stand_in) is family[4]
    assert torch.equal(stand_in(images()), layer(images()))
    assert stand_in.to_batch_norm() is layer


def test_copies_and_files_hold_the_whole_layer_that_tracks_statistics(kind: str) -> None:
    layer, _ = pair(kind)
    layer.eval()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(images()), layer(images()))
        assert other.to_batch_norm().act is other.act
        assert other.act is not layer.act


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_what_tracks_statistics_compiles_without_a_graph_break(kind: str, mode: bool) -> None:
    layer, _ = pair(kind, act_layer=nn.ReLU, drop_layer=None)
    layer.train(mode)
    other, x = copy.deepcopy(layer), images()
    torch._dynamo.reset()
    torch.manual_seed(0)
    expected = other(x)
    torch.manual_seed(0)
    assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)


@pytest.mark.parametrize("family", [FROZEN, NOISY, GHOST, RENORM, STOCHASTIC, EVAL], ids=lambda f: f[0].__name__)
def test_each_family_has_a_class_for_each_layer(family: Family[Any]) -> None:
    layers = (nn.SyncBatchNorm(4), nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4), BatchNormAct2d(4))
    assert tuple(class_for(layer, family) for layer in layers) == family
    assert class_for(Named(4), family) is family[1]
    assert class_for(SyncBatchNormAct(4), family) is family[4]
    assert all(issubclass(each, family[0]) for each in family)
    endings = ["", "1d", "2d", "3d", "Act2d"]
    assert [each.__name__ for each in family] == [family[0].__name__ + ending for ending in endings]


def test_a_layer_of_this_package_has_a_known_forward_and_a_subclass_of_it_may_not(kind: str) -> None:
    layer, plain = pair(kind)
    if kind != "noisy":
        assert has_known_forward(layer)
        assert has_known_forward(plain)
        own = type("Own", (type(plain),), {"forward": lambda self, x: x})
        assert not has_known_forward(own.from_batch_norm(norm_act(), **KINDS[kind][1]))
    x = images()
    layer.drop = nn.Identity()
    assert torch.equal(behind_norm(layer, x), layer.act(x))
    assert behind_norm(plain, x) is x


def test_the_noisy_layer_is_frozen_with_noise_and_an_activation() -> None:
    assert issubclass(NoisyFrozenBatchNormAct2d, FrozenBatchNormAct2d)
    assert not issubclass(NoisyFrozenBatchNorm2d, FrozenBatchNormAct2d)
    with pytest.raises(FinetuneBNError, match="noise: got 1"):
        NoisyFrozenBatchNormAct2d(4, noise=1)


def _double(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


OBSERVED: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "full backward hook": lambda act, saw: act.register_full_backward_hook(saw),
    "full backward pre-hook": lambda act, saw: act.register_full_backward_pre_hook(saw),
    "backward hook of old": lambda act, saw: act.register_backward_hook(saw),
    "forward hook": lambda act, saw: act.register_forward_hook(saw),
    "hook on all modules": lambda act, saw: register_module_forward_hook(saw),
    "pre-hook on all modules": lambda act, saw: register_module_forward_pre_hook(saw),
    "backward hook on all modules": lambda act, saw: register_module_full_backward_hook(saw),
    "a forward put on it": lambda act, saw: _double(act),
}


@pytest.mark.parametrize("way", OBSERVED)
@pytest.mark.parametrize("where", ["act", "drop"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
def test_whoever_observes_the_activation_or_what_is_in_front_of_it_sees_it_run(
    way: str, where: str, act: type[nn.Module]
) -> None:
    found = []
    x = images().double()
    for freeze in (True, False):
        layer: nn.Module = norm_act(act_layer=act, drop_layer=None, inplace=False).double()
        if freeze:
            layer = FrozenBatchNormAct2d.from_batch_norm(layer, "original")  # type: ignore[arg-type]
            layer.fold = "always"  # in one step where nobody looks, however small the activation
        seen: list[str] = []
        observed = getattr(layer, where)
        handle = OBSERVED[way](observed, lambda module, *rest, seen=seen: seen.append(type(module).__name__))
        try:
            y = layer(x.clone().requires_grad_())
            y.sum().backward()
        finally:
            if handle is not None:
                handle.remove()
        found.append((y.detach(), [name for name in seen if name in (act.__name__, "Identity")]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert found[0][1] or way == "a forward put on it"
