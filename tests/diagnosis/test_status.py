"""The status of a model: every normalization layer in its state, every number counted once, irregularities named."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torchvision
from torch import nn

import finetune_bn as fbn
from finetune_bn.diagnosis.status import Status, status
from finetune_bn.errors import FinetuneBNError
from tests.models import OwnForward, Plain, Tied, build, settle
from tests.tools import untouched


def problems(model: nn.Module) -> dict[str, list[str]]:
    return status(model).irregular


def one_problem(model: nn.Module) -> str:
    (problem,) = problems(model)
    return problem


@pytest.mark.parametrize(
    ("policy", "state", "what", "trained"),
    [
        (fbn.Keep(), "live", "untouched", 28),
        (fbn.Ghost(2), "live", "ghost batches x[i::2]", 28),
        (fbn.EvalNorm(0.5), "live", fbn.EvalNorm(0.5).describe(), 28),
        (fbn.FreezeAffine(), "held", "live statistics, affine constant", 0),
        (fbn.Freeze(), "frozen", "freeze, affine=none", 0),
        (fbn.Freeze("shift"), "frozen", "freeze, affine=shift", 14),
        (fbn.Freeze("merged"), "frozen", "freeze, affine=merged", 28),
        (fbn.ToGroupNorm(), "GroupNorm", fbn.ToGroupNorm().describe(), 28),
    ],
    ids=str,
)
def test_each_policy_is_a_state_with_its_trained_numbers(
    policy: fbn.Policy, state: str, what: str, trained: int
) -> None:
    model, x = build("plain")
    found = status(fbn.convert(model, policy, example_input=x))
    assert [(layer.names, layer.state, layer.what) for layer in found.layers] == [
        (("bn1",), state, what),
        (("bn2",), state, what),
    ]
    assert found.trained_norm == sum(layer.trained for layer in found.layers) == trained
    assert found.count(state) == 2  # type: ignore[arg-type]
    assert found.irregular == {}


@pytest.mark.parametrize("policy", [fbn.Keep(), fbn.Freeze(), fbn.Freeze("original"), fbn.FreezeAffine()], ids=str)
def test_no_number_is_lost_or_counted_twice(policy: fbn.Policy) -> None:
    model = settle(timm.create_model("test_efficientnet"))
    numbers = sum(p.numel() for p in model.parameters())
    found = status(fbn.convert(model, policy))
    assert found.trained_norm + found.trained_other + found.constant == numbers
    model.requires_grad_(False)
    assert status(model).trained_norm == status(model).trained_other == 0
    assert status(model).constant == numbers


def test_foreign_frozen_layers_are_named_by_their_class() -> None:
    model = nn.ModuleDict(
        {
            "torchvision": torchvision.ops.FrozenBatchNorm2d(4),
            "timm": timm.layers.FrozenBatchNormAct2d(4),
            "instance": nn.InstanceNorm2d(4, track_running_stats=True),
            "own": OwnForward(4),
            "other": nn.GroupNorm(2, 4),
        }
    )
    found = status(model)
    assert {layer.names[0]: (layer.state, layer.kind) for layer in found.layers} == {
        "torchvision": ("foreign", "torchvision.ops.misc.FrozenBatchNorm2d"),
        "timm": ("foreign", "timm.layers.norm_act.FrozenBatchNormAct2d"),
        "instance": ("foreign", "torch.nn.modules.instancenorm.InstanceNorm2d"),
        "own": ("live", "OwnForward"),
    }
    assert found.trained_norm == 16  # weight and bias of OwnForward and of GroupNorm


def test_a_live_layer_in_eval_mode_is_irregular_only_while_the_model_trains() -> None:
    model = settle(Plain())
    model.bn1.eval()
    assert list(problems(model).values()) == [["bn1"]]
    assert "in eval mode while the model is in training mode" in one_problem(model)
    assert problems(model.eval()) == {}
    assert problems(fbn.convert(settle(Plain()), fbn.Freeze(), verify=False).eval()) == {}


def test_requires_grad_false_does_not_stop_the_statistics_and_that_is_said() -> None:
    model = settle(Plain()).requires_grad_(False)
    assert "yet its statistics move in training" in one_problem(model)
    before = model.bn1.running_mean.clone()
    model(torch.randn(2, 3, 9, 9))
    assert not torch.equal(before, model.bn1.running_mean)
    assert problems(model.eval()) == {}


def test_a_constant_that_requires_a_gradient_is_irregular() -> None:
    frozen = fbn.convert(settle(Plain()), fbn.Freeze("shift"), verify=False)
    frozen.bn2.weight.requires_grad_(True)
    assert problems(frozen) == {"a constant requires a gradient: an optimizer that holds it would move it": ["bn2"]}
    held = fbn.convert(settle(Plain()), fbn.FreezeAffine(), verify=False)
    held.bn1.bias.requires_grad_(True)
    assert "a constant requires a gradient" in one_problem(held)


def test_what_is_to_be_learned_and_requires_no_gradient_is_irregular() -> None:
    model = fbn.convert(settle(Plain()), fbn.Freeze("original"), verify=False)
    model.bn1.weight.requires_grad_(False)
    assert problems(model) == {"affine=original is to train weight, and requires_grad is False there": ["bn1"]}


def test_a_layer_frozen_before_it_saw_an_image_is_irregular() -> None:
    # pytorch/vision#4499 and segmentation models: a new decoder's BatchNorm, frozen with the encoder's
    model = nn.ModuleDict({"encoder": settle(Plain()), "decoder": Plain()})
    fbn.convert(model, fbn.Rules([("*", fbn.Freeze())]), verify=False)  # a policy without rules keeps it live
    assert "frozen at the statistics of a layer that has seen no image" in one_problem(model)
    assert list(problems(model).values()) == [["decoder.bn1", "decoder.bn2"]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda bn: bn.running_mean.fill_(float("nan")), "running_mean is not finite"),
        (lambda bn: bn.running_var.fill_(-1.0), "running_var is negative"),
        (lambda bn: nn.init.constant_(bn.weight, float("inf")), "weight is not finite"),
        (lambda bn: setattr(bn, "momentum", None), "momentum None"),
        (lambda bn: setattr(bn, "momentum", 0.0), "momentum 0"),
        (lambda bn: setattr(bn, "running_mean", None), "normalizes by the batch in evaluation too"),
    ],
)
def test_values_and_settings_that_go_wrong_in_silence_are_named(change: object, words: str) -> None:
    model = settle(Plain())
    change(model.bn2)  # type: ignore[operator]
    assert words in one_problem(model)
    assert list(problems(model).values()) == [["bn2"]]


def test_a_shared_layer_is_counted_once_and_named_by_all_its_names() -> None:
    found = status(settle(Tied()))
    assert [layer.names for layer in found.layers] == [("first.bn", "second.bn"), ("between",)]
    assert list(found.irregular.values()) == [["first.bn = second.bn"]]
    assert found.trained_norm == 16


def test_asking_changes_nothing_and_takes_wrapped_and_lazy_and_meta_models() -> None:
    model = fbn.convert(settle(Plain()), fbn.Freeze("original"), verify=False)
    with untouched(model):
        status(model)
    assert status(torch.compile(model)).count("frozen") == 2  # type: ignore[arg-type]
    assert status(nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d())).count("live") == 1
    with torch.device("meta"):
        assert status(Plain()).count("live") == 2
    assert status(nn.Linear(2, 2)) == Status("Linear", (), 0, 6, 0)
    assert "no BatchNorm layer; nothing irregular" in str(status(nn.Linear(2, 2)))


def test_the_text_is_a_table_and_the_dictionary_is_plain() -> None:
    model = fbn.convert(
        settle(timm.create_model("test_resnet")), fbn.Rules([("bn1", fbn.Keep()), ("*", fbn.Freeze("shift"))])
    )
    model.bn1.eval()
    found = status(model)
    first, header, line, *rows, numbers, irregular = str(found).splitlines()
    frozen = found.count("frozen")
    assert first == f"ResNet: {frozen} frozen, 1 live; 1 irregular"
    assert header.split() == ["layers", "state", "under", "type", "trained", "names"]
    assert set(line) == {"-"}
    assert rows[0].split()[:2] == [str(frozen), "frozen"]
    assert "more" in rows[0]
    assert f"{found.trained_norm:,} numbers of normalization layers" in numbers
    assert irregular.startswith("irregular: bn1: in eval mode")
    data = json.loads(json.dumps(found.to_dict()))
    assert len(data["layers"]) == frozen + 1
    assert data["irregular"] == found.irregular


def test_what_is_no_module_is_refused_by_name() -> None:
    with pytest.raises(FinetuneBNError, match=r"model: got 'resnet18'; allowed: a torch\.nn\.Module"):
        status("resnet18")  # type: ignore[arg-type]
