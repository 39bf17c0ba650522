"""Layers whose tensors are used beside them, or that nothing reached: found by a run in training mode, and named."""

from __future__ import annotations

import copy
import random

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._features_fx import create_feature_extractor as of_timm
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor as of_torchvision

import finetune_bn as fbn
from finetune_bn.conversion.training_run import run_in_training, tensors_restored
from finetune_bn.errors import ConversionMismatch, NoBatchNormMatched, UnsupportedLayer
from finetune_bn.utilities.probe import Probe
from tests.models import settle

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
POLICIES = [fbn.Freeze("none"), fbn.Freeze("merged"), fbn.Freeze(noise=4), fbn.Ghost(2), fbn.Renorm(), fbn.Stochastic()]


class ByHand(nn.Module):
    """Its second BatchNorm only holds the tensors, as code for meta-learning has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x, b = self.conv2(F.relu(self.bn1(self.conv1(x)))), self.bn2
        return F.batch_norm(x, b.running_mean, b.running_var, b.weight, b.bias, self.training, 0.1, b.eps)


class InTrainingOnly(nn.Module):
    """An auxiliary head, as GoogLeNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.aux, self.unused = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.BatchNorm2d(8),
            nn.BatchNorm2d(8),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn(x) + self.aux(x) if self.training else self.bn(x)


class Remembers(nn.Module):
    """Its forward changes buffers, parameters, a plain tensor, a list and the random state, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.momentum_copy = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3)
        self.register_buffer("queue", torch.zeros(4))
        self.seen: list[int] = []
        self.plain = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.momentum_copy.weight.data = self.momentum_copy.weight.data * 0.9
            self.momentum_copy.bias.data.add_(1.0)
            self.queue.add_(torch.rand(4))
            self.seen.append(len(x))
            self.plain += 1
        return F.dropout(self.bn(self.conv(x)), training=self.training)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.describe())
def test_a_layer_whose_tensors_are_used_by_hand_is_refused_and_nothing_is_changed(policy: fbn.Policy) -> None:
    """huggingface/pytorch-image-models#1910: the plan said 2 x freeze, and one of the two went on moving."""
    model = settle(ByHand())
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    row = fbn.plan(model, policy, X).rows[1]
    assert row.refused
    assert "used beside the layer" in row.reason
    # a plan that was made without an input cannot know; the proof does
    blind = fbn.plan(model, policy, probe=False)
    with pytest.raises(ConversionMismatch, match=r"1 of 2 converted layers go on moving: bn2\..*\(\"bn2\", Keep\(\)\)"):
        fbn.convert(model, blind, example_input=X)
    with pytest.raises((UnsupportedLayer, ConversionMismatch), match="bn2"):
        fbn.convert(model, policy, example_input=X)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    fbn.convert(model, fbn.Rules([("bn2", fbn.Keep()), ("*", policy)]), example_input=X)  # the way out


@pytest.mark.parametrize("policy", [fbn.FreezeAffine(), fbn.NormalizeOnly(change_function=True)], ids=str)
def test_gamma_and_beta_are_held_also_where_their_tensors_are_used_by_hand_and_the_plan_says_no_other(
    policy: fbn.Policy,
) -> None:
    # Found by `make fuzz`: the plan said REFUSED, and convert carried it out.
    model = settle(ByHand())
    the_plan = fbn.plan(model, policy, X)
    assert not the_plan.refused
    fbn.convert(model, policy, example_input=X).train()(X).sum().backward()
    assert model.bn2.weight.grad is None
    assert model.conv2.weight.grad is not None


@pytest.mark.parametrize("traced", [of_timm, of_torchvision], ids=["timm", "torchvision"])
def test_of_a_graph_that_was_traced_first_converted_is_said_only_of_what_stays(
    traced: object, caplog: pytest.LogCaptureFixture
) -> None:
    """huggingface/pytorch-image-models#1910: 48 of 49 running means moved, the plan said freeze."""

    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            net = settle(timm.create_model("test_resnet"))
            self.body = traced(net, {"layer4": "out"})  # type: ignore[operator]
            self.neck = settle(nn.BatchNorm1d(net.num_features))

        def forward(self, x: Tensor) -> Tensor:
            out = self.body(x)
            return self.neck((out["out"] if isinstance(out, dict) else out[0]).mean((2, 3)))

    model = WithHead()
    x = torch.randn(4, 3, 32, 32)
    fbn.convert(model, fbn.Freeze(), example_input=x)
    before = {k: v.clone() for k, v in model.state_dict().items() if "running_mean" in k}
    model.train()(x)
    moved = [k for k, v in model.state_dict().items() if k in before and not torch.equal(v, before[k])]
    for key in moved:  # what moves is named
        assert key.removesuffix(".running_mean") in " ".join(
            row.names[0] + " " for row in fbn.plan(model, fbn.Freeze(), x).rows if row.policy is None
        )
    if moved:
        assert f"{len(moved)} layers are left alone" in caplog.text
        assert "holds the tensors of one for a traced graph" in caplog.text
    with pytest.raises(NoBatchNormMatched, match="convert first, trace then") if moved else caplog.at_level(20):
        fbn.convert(traced(timm.create_model("test_resnet"), {"layer4": "o"}), fbn.Freeze("none"))  # type: ignore[operator]


def test_layers_that_run_in_training_only_are_told_from_those_that_never_run(caplog: pytest.LogCaptureFixture) -> None:
    model = settle(InTrainingOnly())
    reasons = {row.names[0]: row.reason for row in fbn.plan(model, fbn.Freeze(), X).rows}
    assert reasons == {
        "bn": "",
        "aux": "runs in training mode only",
        "unused": "no probe input reached it in eval or training mode",
    }
    fbn.convert(model, fbn.Freeze(), example_input=X)
    assert "1 of 3 converted layers are proven one by one only" in caplog.text
    assert "reached them in eval or training mode: unused" in caplog.text


def test_a_network_that_takes_no_probe_in_training_mode_is_converted_and_said_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class NeedsTargets(nn.Sequential):
        def forward(self, x: Tensor, targets: object = None) -> Tensor:
            if self.training and targets is None:
                raise ValueError("targets should not be none when in training mode")
            return super().forward(x)  # type: ignore[no-any-return]

    model = NeedsTargets(nn.Conv2d(3, 4, 3), settle(nn.BatchNorm2d(4)))
    with caplog.at_level("INFO"):
        fbn.convert(model, fbn.Freeze(), example_input=X)
    assert "not looked at in training mode" in caplog.text
    assert "targets should not be none" in caplog.text


@pytest.mark.parametrize("policy", [fbn.Freeze(), fbn.Renorm(), fbn.Keep()], ids=lambda p: p.describe())
def test_the_run_leaves_no_trace(policy: fbn.Policy) -> None:
    torch.manual_seed(0)
    model = settle(Remembers()).train()
    state = copy.deepcopy(model.state_dict())
    storage = {name: p.data_ptr() for name, p in model.momentum_copy.named_parameters()}
    rng, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    python = random.getstate()
    fbn.convert(model, policy, example_input=X)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {name: p.data_ptr() for name, p in model.momentum_copy.named_parameters()} == storage
    assert (model.seen, model.plain.tolist()) == ([], [0.0, 0.0])
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == python
    assert [m.training for m in model.modules()] == modes


def test_restoring_survives_an_error() -> None:
    layer = settle(nn.BatchNorm2d(3))
    mean = layer.running_mean.clone()

    def fail() -> None:
        with tensors_restored(layer):
            layer.running_mean.add_(1)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert torch.equal(layer.running_mean, mean)


def test_a_batch_of_one_image_does_not_stop_the_run() -> None:
    """A live BatchNorm behind the pooling cannot train on one image; it is not what is looked at."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
    run = run_in_training(model, [Probe("", (X[:1],))], [model[1]])
    assert (run.ran, run.moved, run.problem) == ({0}, {0}, "")
