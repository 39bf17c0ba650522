"""Converted networks are traced by torch.fx, and differentiated in forward mode, as those of torch are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._features import FeatureHookNet, FeatureListNet
from timm.models._features_fx import FeatureGraphNet
from timm.models._features_fx import create_feature_extractor as of_timm
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor as of_torchvision

import finetune_bn as fbn
from finetune_bn.layers import FrozenBatchNorm
from finetune_bn.layers.leaf import as_leaf
from tests.models import settle

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FROZEN = [fbn.Freeze(kind) for kind in ("none", "shift", "merged", "original")]  # type: ignore[arg-type]
OTHERS = [fbn.Freeze(noise=4), fbn.Ghost(2), fbn.Renorm(), fbn.Stochastic(), fbn.EvalNorm(0.1), fbn.ToGroupNorm()]
NETS = {"test_resnet": "layer4", "test_efficientnet": "blocks.3"}


def described(policy: fbn.Policy) -> str:
    return policy.describe()


def made(net: str) -> nn.Module:
    torch.manual_seed(0)
    return settle(timm.create_model(net))


def converted(net: str, policy: fbn.Policy) -> nn.Module:
    return fbn.convert(made(net), policy, example_input=X)


def first(output: Any) -> Tensor:
    values = output.values() if isinstance(output, dict) else output
    return output if torch.is_tensor(output) else next(iter(values))  # type: ignore[no-any-return]


@pytest.mark.parametrize("policy", [*FROZEN, *OTHERS], ids=described)
@pytest.mark.parametrize("net", NETS)
def test_graphs_compute_what_the_network_does_in_both_modes(net: str, policy: fbn.Policy) -> None:
    """pytorch/vision#5508: torchvision's frozen layers are traced, ours raised TraceError."""
    model = converted(net, policy)
    reference = of_torchvision(made(net), {NETS[net]: "o"})
    graphs = [torch.fx.symbolic_trace(model), of_torchvision(model, {NETS[net]: "o"}), of_timm(model, {NETS[net]: "o"})]
    model.eval()
    if not isinstance(policy, (fbn.EvalNorm, fbn.ToGroupNorm)):
        with torch.no_grad():
            torch.testing.assert_close(first(graphs[1].eval()(X)), first(reference.eval()(X)), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(first(graphs[2].eval()(X)), first(reference(X)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(graphs[0].eval()(X), model(X))
    kinds = {type(m) for m in model.modules() if type(m).__module__.startswith("finetune_bn")}
    for graph in graphs:  # the layers are still layers there, with their modes and hooks
        assert kinds & {type(m) for m in graph.modules()}
        first(graph.train()(X)).sum().backward()


@pytest.mark.parametrize("policy", FROZEN, ids=described)
def test_a_traced_network_still_knows_its_layers(policy: fbn.Policy) -> None:
    model = of_torchvision(converted("test_resnet", policy), {"layer4": "o"})
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model.train()(X)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k in before)
    fbn.recalibrate(model, torch.randn(16, 3, 32, 32))
    fbn.revert(model, verify=False)
    assert not any(isinstance(m, FrozenBatchNorm) for m in model.modules())


@pytest.mark.parametrize("wrapper", [FeatureListNet, FeatureHookNet, FeatureGraphNet])
def test_timms_feature_networks(wrapper: Callable[..., nn.Module]) -> None:
    plain = wrapper(made("test_resnet"), out_indices=(1, 2)).eval()
    ours = wrapper(converted("test_resnet", fbn.Freeze("original")), out_indices=(1, 2)).eval()
    for a, b in zip(ours(X), plain(X), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", [*FROZEN, *OTHERS], ids=described)
def test_quantization_aware_training_of_graphs(policy: fbn.Policy) -> None:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = fbn.convert(settle(net), policy, example_input=X).train()
    prepared = prepare_qat_fx(model, get_default_qat_qconfig_mapping("fbgemm"), (X,))
    prepared(X).sum().backward()
    quantized = convert_fx(prepared.eval())
    assert "quantized" in type(quantized.get_submodule("0")).__module__
    assert quantized(X).shape == (4, 4)


def test_what_is_neither_tensor_nor_proxy_is_named() -> None:
    layer = fbn.convert(settle(nn.BatchNorm2d(3)), fbn.Freeze())
    with pytest.raises(TypeError, match="FrozenBatchNorm2d: expected a tensor, got list"):
        layer([X])
    with pytest.raises(TypeError, match="got int"):
        as_leaf(layer, 3)


def energy(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: F.silu(layer(x)).square().sum()


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("policy", [*FROZEN, *(p for p in OTHERS if not isinstance(p, fbn.ToGroupNorm))], ids=described)
def test_forward_mode_in_eval_mode_is_that_of_batch_norm(policy: fbn.Policy, act: bool) -> None:
    from timm.layers import BatchNormAct2d

    if isinstance(policy, fbn.EvalNorm):
        pytest.skip("its function is another on purpose; the next test looks at it")
    plain = settle(BatchNormAct2d(3, act_layer=nn.SiLU) if act else nn.BatchNorm2d(3)).double().eval()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.func.hessian(energy(plain))(x), torch.func.jvp(plain, (x,), (x.cos(),)), plain(x)
    layer = fbn.convert(plain, policy).eval()
    found = torch.func.hessian(energy(layer))(x), torch.func.jvp(layer, (x,), (x.cos(),))
    torch.testing.assert_close(found, expected[:2], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(torch.func.vmap(layer)(torch.stack([x, x]))[1], expected[2], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("policy", FROZEN, ids=described)
def test_hessians_of_the_weights_of_a_frozen_network_in_training_mode(policy: fbn.Policy) -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2), nn.SiLU())).double()
    x = X[:2, :, :4, :4].double()

    def hessian(model: nn.Module) -> Tensor:
        def loss(weight: Tensor) -> Tensor:
            return torch.func.functional_call(model, {"0.weight": weight}, (x,)).square().sum()

        return torch.func.hessian(loss)(model.get_parameter("0.weight").detach())  # type: ignore[no-any-return]

    expected = hessian(net.eval())
    model = fbn.convert(net, policy, example_input=x).train()
    torch.testing.assert_close(hessian(model), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("policy", [fbn.Ghost(2), fbn.Renorm(), fbn.Stochastic(), fbn.EvalNorm(0.1)], ids=described)
def test_live_layers_in_training_mode_name_the_way_out(policy: fbn.Policy) -> None:
    layer = fbn.convert(settle(nn.BatchNorm2d(3)), policy, verify=False).double().train()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    with pytest.raises(fbn.FinetuneBNError, match=r"eval\(\) first"):
        torch.func.hessian(energy(layer))(x)
    torch.manual_seed(0)
    assert torch.autograd.functional.hessian(energy(layer), x).isfinite().all()  # the way out
