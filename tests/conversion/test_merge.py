"""Norm layers merged into weights for good: the same function, torch's own layers alone, all or nothing."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.testing import assert_close

import finetune_bn as fbn
from finetune_bn.errors import ConversionMismatch, NoBatchNormMatched, UnsupportedLayer
from finetune_bn.layers.frozen import AFFINE_KINDS
from tests.models import IMAGE, NETS, AsksForItsType, build, settle
from tests.tools import untouched

# How many BatchNorm layers have nothing in front that they fit into.
STAY = {"tied": 2, "pre_activation": 3, "conv_twice": 2, "root": 1}
TREATMENTS: dict[str, fbn.Policy | None] = {
    "live": None,
    **{f"{affine}, {fold}": fbn.Freeze(affine, fold=fold) for affine in AFFINE_KINDS for fold in ("never", "auto")},
    "noise": fbn.Freeze("none", noise=8),
    "ghost": fbn.Ghost(2),
    "held": fbn.FreezeAffine(),
}


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def of_this_package(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__module__.startswith("finetune_bn")]


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("net", NETS)
def test_the_merged_network_computes_the_same_with_torchs_layers_alone(net: str, treatment: str) -> None:
    model, x = build(net)
    model.double()
    policy, x = TREATMENTS[treatment], x.double()
    if policy is not None:
        model = fbn.convert(model, policy, example_input=x)
    before = outputs(model, x)
    model = fbn.fold(model, x)
    assert not any(module.training for module in model.modules())
    assert of_this_package(model) == []
    assert sum(isinstance(module, _BatchNorm) for module in model.modules()) == STAY.get(net, 0)
    assert_close(outputs(model, x), before, rtol=1e-10, atol=1e-10)
    assert_close(model(x), before, rtol=1e-10, atol=1e-10)  # with autograd, too


MAPS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 7)),
    "conv2d": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 7, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), (2, 4, 7, 7)),
    "conv3d": (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), (2, 4, 3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
}


@pytest.mark.parametrize("kind", MAPS)
def test_weights_and_biases_are_those_of_torchs_fusion(kind: str) -> None:
    producer, bn, shape = copy.deepcopy(MAPS[kind])
    model = settle(nn.Sequential(producer, bn)).eval()
    x = torch.randn(shape)
    if kind == "linear":
        fused: Any = fuse_linear_bn_eval(producer, bn)
    else:
        fused = fuse_conv_bn_eval(producer, bn, transpose=kind == "transposed")
    fbn.fold(model, x)
    assert model[0] is producer
    assert_close(producer.weight, fused.weight)
    assert_close(producer.bias, fused.bias)
    assert isinstance(model[1], nn.Identity)


def test_a_grouped_transposed_convolution_scales_each_groups_own_channels() -> None:
    model = settle(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)))  # torch's fusion fails
    x = torch.randn(2, 4, 5, 5)
    before = outputs(model, x)
    fbn.fold(model, x)
    assert isinstance(model[1], nn.Identity)
    assert_close(model(x), before)


def test_activation_and_drop_layer_stay() -> None:
    model, x = build("norm_act")
    act = model[1].act
    fbn.fold(model, x)
    assert list(model[1]) == [model[1][0], act]
    assert isinstance(model[1][0], nn.Dropout)
    assert not model[1][0].training


def test_hooks_of_the_norm_layer_go_on_seeing_its_output() -> None:
    model, x = build("plain")
    seen: list[Tensor] = []
    model.bn1.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    outputs(model.train(), x)
    fbn.fold(model, x)
    seen.clear()
    model.act.inplace = False
    model(x)
    assert len(seen) == 1
    assert_close(model.conv1(x), seen[0])


def test_what_stays_is_logged_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    model, x = build("conv_twice")
    with caplog.at_level(logging.INFO, "finetune_bn"):
        fbn.fold(model, x)
    assert "0 of 2 BatchNorm layers merged" in caplog.text
    assert "2 of 2 BatchNorm layers stay: bn1, bn2. Why: 2 x conv runs 2 times" in caplog.text


def test_layers_that_are_no_plain_scale_and_shift_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    first, x = model[1], torch.randn(IMAGE)
    settle(model)
    before = outputs(model, x)
    fbn.fold(model, x)
    assert model[1] is first
    assert isinstance(model[3], nn.Identity)
    assert "it has no running statistics" in caplog.text
    assert_close(outputs(model, x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_merge_is_made_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(dtype).to(memory_format=torch.channels_last)
    wide = copy.deepcopy(model).float().eval()
    expected = fuse_conv_bn_eval(wide[0], wide[1]).weight
    fbn.fold(model, torch.randn(IMAGE).to(dtype))
    assert model[0].weight.dtype == dtype
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model[0].weight, expected.to(dtype))


def test_frozen_parameters_stay_frozen_and_shared_tensors_of_others_stay_what_they_are() -> None:
    model, x = build("plain")
    model.conv1.weight.requires_grad_(False)
    weight, values = model.conv2.weight, model.conv2.weight.detach().clone()
    fbn.fold(model, x)
    assert not model.conv1.weight.requires_grad
    assert not model.conv1.bias.requires_grad
    assert model.conv2.weight.requires_grad
    assert torch.equal(weight, values)  # an EMA, or another module, may hold it


def test_a_pickle_loads_where_this_package_is_not_installed(tmp_path: Path) -> None:
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten()))
    x = torch.randn(IMAGE)
    fbn.convert(model, fbn.Freeze("original", fold="always"), example_input=x)
    before = outputs(model, x)
    fbn.fold(model, x)
    torch.save({"model": model, "x": x, "before": before}, tmp_path / "model.pt")
    code = f"""
import sys, torch
sys.modules["finetune_bn"] = None
found = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
torch.testing.assert_close(found["model"](found["x"]), found["before"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


class Doubles(nn.Module):
    """Its forward asks whether `bn`, behind a convolution, is a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return self.last(F.relu(x if isinstance(self.bn, nn.BatchNorm2d) else 2 * x))


class Reads(Doubles):
    """Its forward reads the weight of `bn`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.bn(self.conv(x)) * self.bn.weight.sum()))


@pytest.mark.parametrize(("kind", "words"), [(Doubles, "outputs before and after differ by"), (Reads, "it raises")])
@pytest.mark.parametrize("training", [True, False])
def test_on_any_mismatch_the_model_is_as_it_was(kind: type[nn.Module], words: str, training: bool) -> None:
    model, x = settle(kind()).train(training), torch.randn(IMAGE)
    with untouched(model), pytest.raises(ConversionMismatch, match=f"^the network: .*{words}"):
        fbn.fold(model, x)


def test_what_asks_for_the_type_of_a_layer_that_stays_goes_on_working() -> None:
    model, x = settle(AsksForItsType()), torch.randn(IMAGE)
    before = outputs(model, x)
    fbn.fold(model, x)
    assert [type(layer) for layer in (model.bn1, model.bn2)] == [nn.Identity, nn.BatchNorm2d]
    assert_close(outputs(model, x), before)


def test_a_network_that_amplifies_rounding_is_proven_in_float64(caplog: pytest.LogCaptureFixture) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            return torch.sin(1e5 * y)

    model, x = settle(Chain()), torch.randn(IMAGE)
    fbn.fold(model, x)
    assert "proven in float64" in caplog.text
    assert isinstance(model.bn, nn.Identity)


def test_wrong_arguments_are_named_and_nothing_is_touched() -> None:
    model, x = build("plain")
    wrong = torch.randn(2, 4, 9, 9)
    with untouched(model):
        with pytest.raises(fbn.FinetuneBNError, match=r"^example_input: got None; allowed: what Plain.forward takes"):
            fbn.fold(model)
        with pytest.raises(fbn.FinetuneBNError, match=r"^example_input: got \[\(2, 4, 9, 9\)\]"):
            fbn.fold(model, wrong)
    with pytest.raises(NoBatchNormMatched, match=r"^model: got 'Sequential'"):
        fbn.fold(nn.Sequential(nn.ReLU()), x)
    with pytest.raises(fbn.FinetuneBNError, match=r"^model: got .* whose tensors have values"):
        fbn.fold(build("plain")[0].to("meta"), x)


@pytest.mark.parametrize("net", ["plain", "norm_act"])
def test_group_norm_becomes_torchs_own(net: str) -> None:
    model, x = build(net)
    model = fbn.convert(model, fbn.ToGroupNorm(2), example_input=x)
    before, expected = outputs(model, x), sum(isinstance(module, nn.GroupNorm) for module in model.modules())
    model = fbn.fold(model, x)
    assert of_this_package(model) == []
    assert sum(type(module) is nn.GroupNorm for module in model.modules()) == expected > 0
    assert_close(outputs(model, x), before)


def test_eval_norm_which_is_no_batch_norm_in_evaluation_is_refused() -> None:
    model, x = build("plain")
    fbn.convert(model, fbn.EvalNorm(0.1), example_input=x)
    with untouched(model), pytest.raises(UnsupportedLayer, match=r"bn1 \(EvalBatchNorm2d\)"):
        fbn.fold(model, x)


def test_timm_reparameterizes_after_revert() -> None:
    timm = pytest.importorskip("timm")
    from timm.utils import reparameterize_model

    torch.manual_seed(0)
    model = settle(timm.create_model("repghostnet_050", num_classes=3)).eval()
    x = torch.randn(2, 3, 64, 64)
    before = outputs(model, x)
    fbn.convert(model, fbn.Freeze("merged"), example_input=x)
    fbn.revert(model, example_input=x)
    deployed = reparameterize_model(model)
    assert sum(isinstance(m, _BatchNorm) for m in deployed.modules()) < sum(
        isinstance(m, _BatchNorm) for m in model.modules()
    )
    assert_close(outputs(deployed, x), before, rtol=1e-3, atol=1e-3)


def test_a_timm_network_needs_no_example_input() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = settle(timm.create_model("test_efficientnet", num_classes=3))
    x = torch.randn(2, 3, 64, 64)
    before = outputs(model, x)
    fbn.convert(model, fbn.Freeze("none"))
    model = pickle.loads(pickle.dumps(fbn.fold(model)))
    assert not any(isinstance(m, _BatchNorm) for m in model.modules())
    assert_close(outputs(model, x), before, rtol=1e-4, atol=1e-5)
