"""Finding the BatchNorm layers, all of their names, and what feeds them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import finetune_bn as fbn
from finetune_bn.errors import FinetuneBNError
from finetune_bn.layers.sites import find_batch_norms, find_lookalikes, timm_stages
from tests.models import NETS, Plain, Tied, build, settle


def names(model: nn.Module) -> list[tuple[str, ...]]:
    return [site.names for site in find_batch_norms(model)]


def test_layers_are_found_in_the_order_of_definition_with_class_and_channels() -> None:
    model = Plain()
    sites = find_batch_norms(model)
    assert [(s.names, s.kind, s.num_features) for s in sites] == [
        (("bn1",), "BatchNorm2d", 6),
        (("bn2",), "BatchNorm2d", 8),
    ]
    assert sites[1].module is model.bn2


def test_a_shared_layer_is_one_site_with_all_its_names() -> None:
    assert names(Tied()) == [("first.bn", "second.bn"), ("between",)]
    holder = nn.ModuleList([nn.BatchNorm1d(2)])
    assert names(nn.ModuleDict({"a": holder, "b": holder})) == [("a.0", "b.0")]  # a shared parent shares its children


def test_the_root_is_found_under_the_empty_name() -> None:
    assert names(nn.BatchNorm2d(3)) == [("",)]


@pytest.mark.parametrize("net", NETS)
def test_frozen_layers_are_found_where_the_live_ones_were(net: str) -> None:
    model, _ = build(net)
    before = names(model)
    assert before
    converted = fbn.convert(model, fbn.Freeze())
    assert names(converted) == before
    assert all(site.kind.startswith("Frozen") for site in find_batch_norms(converted))


def test_what_is_no_batch_norm_is_not_a_site() -> None:
    model = nn.Sequential(nn.GroupNorm(1, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4, track_running_stats=True))
    assert names(model) == []
    assert [name for name, _ in find_lookalikes(model)] == ["2"]


class BatchNormOfMyOwn(nn.Module):
    """Keeps no buffer, and says in its name what it is."""


class KeepsAVariance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(2))


def test_layers_that_only_look_like_batch_norm_are_named() -> None:
    wrapper = nn.Sequential(nn.BatchNorm2d(2))
    wrapper.__class__ = type("BatchNormAndMore", (nn.Sequential,), {})
    model = nn.Sequential(BatchNormOfMyOwn(), KeepsAVariance(), nn.BatchNorm2d(2), wrapper, nn.Linear(2, 2))
    assert [name for name, _ in find_lookalikes(model)] == ["0", "1"]


@pytest.mark.parametrize("package", ["torchvision.ops", "timm.layers"])
def test_layers_of_other_packages_that_keep_statistics_are_named(package: str) -> None:
    module = pytest.importorskip(package)
    layers = {
        "torchvision.ops": lambda: [module.FrozenBatchNorm2d(4)],
        "timm.layers": lambda: [module.EvoNorm2dB0(4), module.FrozenBatchNormAct2d(4)],
    }[package]()
    assert [layer for _, layer in find_lookalikes(nn.Sequential(*layers))] == layers
    assert find_batch_norms(nn.Sequential(*layers)) == []


# Stages


def test_stages_are_those_of_timms_coarse_group_matcher_however_deep_the_model_lies() -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_resnet")
    model = nn.ModuleDict({"backbone": net, "neck": nn.BatchNorm1d(4)})
    stages = timm_stages(model, [name for site in find_batch_norms(model) for name in site.names])
    assert stages["backbone.bn1"] == 0
    assert {stages[name] for name in stages if name.startswith("backbone.layer3.")} == {3}
    assert set(stages.values()) == {0, 1, 2, 3, 4}
    assert "neck" not in stages
    assert len(stages) == len(find_batch_norms(net))


def test_stages_without_a_timm_model_are_an_error() -> None:
    with pytest.raises(FinetuneBNError, match=r"rule.stage: got .Plain.; allowed: a model that holds a whole timm"):
        timm_stages(Plain(), ["bn1"])


@pytest.mark.parametrize("way", ["script", "trace"])
def test_layers_within_a_script_module_are_named_and_left_alone(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """It was an AttributeError in plan, convert and recalibrate."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            part = settle(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).eval()
            self.bn = settle(nn.BatchNorm2d(3))
            self.part = torch.jit.script(part) if way == "script" else torch.jit.trace(part, x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.part(self.bn(x))  # type: ignore[no-any-return]

    x = torch.randn(4, 3, 8, 8)
    model = Holder()
    rows = {row.names[0]: row.reason for row in fbn.plan(model, fbn.Freeze(), x).rows if row.policy is None}
    assert rows == {"part.1": "left alone: is a BatchNorm2d within a ScriptModule, where no layer can be replaced"}
    expected = model.eval()(x)
    fbn.convert(model, fbn.Freeze(), example_input=x)
    assert "1 layers are left alone (part.1)" in caplog.text
    torch.testing.assert_close(model(x), expected)
    record = fbn.recalibrate(model, torch.randn(16, 3, 8, 8))
    assert [name for name, _ in record.left_alone] == ["part.1"]
    fbn.revert(model, example_input=x)
    model.bn = nn.Identity()
    with pytest.raises(FinetuneBNError, match=r"part\.1 is a BatchNorm2d within a ScriptModule"):
        fbn.convert(model, fbn.Freeze())


def test_a_timm_net_that_gives_features_only_tells_no_stages_and_the_message_says_so() -> None:
    model = pytest.importorskip("timm").create_model("resnet18", features_only=True)
    with pytest.raises(FinetuneBNError, match=r"FeatureListNet.*features_only=True leaves that out.*name pattern"):
        fbn.plan(model, fbn.Rules([fbn.Rule(fbn.Freeze(), stage=0)]))
