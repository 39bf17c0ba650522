"""Weights from files: strictly loaded, and one clear error for each way in which they do not fit."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune_bn import Freeze, Keep, Rules
from finetune_bn.backbones.create import create_backbone
from finetune_bn.errors import BadData, FinetuneBNError, MissingDependency
from tests.timm_nets import TINY, images, randomized, same_logits, saved, timm


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


def test_a_renaming_that_fails_on_a_foreign_file_leaves_the_word_to_the_strict_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(state: Any, model: Any) -> Any:
        raise KeyError("made for another file")

    monkeypatch.setattr(sys.modules[timm.model_entrypoint("test_convnext").__module__], "checkpoint_filter_fn", fails)
    with pytest.raises(BadData, match=r"missing .* unexpected"):
        create_backbone("test_convnext", saved(tmp_path, randomized().state_dict()))


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
    with pytest.raises(
        FinetuneBNError, match=r"weights: got .*'pretrained'.*'package', 'package:NAME', None.*\.safetensors"
    ):
        create_backbone(TINY, weights)


def test_a_file_of_an_unknown_suffix_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.onnx").write_bytes(b"1")
    with pytest.raises(FinetuneBNError, match=r"Its suffix is '.onnx'"):
        create_backbone(TINY, tmp_path / "weights.onnx")
    with pytest.raises(FinetuneBNError, match="no such file"):
        create_backbone(TINY, tmp_path)


@pytest.mark.parametrize(("module", "package"), [("timm", "timm"), ("safetensors.torch", "safetensors")])
def test_a_missing_library_is_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    path = saved(tmp_path, randomized().state_dict(), "w.safetensors")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=f"pip install {package}"):
        create_backbone(TINY, path)
