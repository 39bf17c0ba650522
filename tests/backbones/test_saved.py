"""The model file: what comes out of it computes what went in, and what is wrong with a file is one error."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.backbones import card as cards
from finetune_bn.backbones.card import Transform
from finetune_bn.errors import BadData, ConversionMismatch, FinetuneBNError, MissingDependency
from finetune_bn.layers import FrozenBatchNorm, GroupNorm
from tests.models import settle
from tests.tools import assert_same_state, untouched

timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")

SMALL = Transform((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLASSES = ["cat", "dog", "猫"]
POLICIES: list[fbn.Policy] = [
    fbn.Keep(),
    *(fbn.Freeze(affine) for affine in ("none", "shift", "merged", "original")),  # type: ignore[arg-type]
    fbn.Freeze("original", noise=8),
    fbn.FreezeAffine(),
    fbn.NormalizeOnly(change_function=True),
    fbn.Ghost(groups=2),
    fbn.Renorm(),
    fbn.Stochastic(0.5),
    fbn.EvalNorm(0.75),
    fbn.ToGroupNorm(groups=4),
    fbn.ToGroupNorm(init="copy", eps=1e-3),
    fbn.Rules([("bn1", fbn.ToGroupNorm()), ("layer1.*", fbn.EvalNorm(0.5)), ("*", fbn.Freeze("merged"))]),
]


def network(policy: fbn.Policy | None = None, name: str = "test_resnet", **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    net = settle(timm.create_model(name, num_classes=3, **arguments))
    return net if policy is None else fbn.convert(net, policy)


def trained(net: nn.Module) -> nn.Module:
    """Return the network after a step in which everything learnable and live has moved."""
    net.train()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
    net(torch.randn(8, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    return net


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return fbn.save(network(), tmp_path / "model.safetensors", classes=CLASSES, transform=SMALL)


def rewritten(file: Path, change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> Path:
    """Write the file anew, with its tensors and its metadata changed."""
    content = file.read_bytes()
    tensors = safetensors.load(content)
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    change(tensors, metadata)
    file.write_bytes(safetensors.save(tensors, metadata))
    return file


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__ + str(policy.describe()))
def test_what_is_loaded_computes_what_was_saved_under_every_policy(policy: fbn.Policy, tmp_path: Path) -> None:
    net = trained(network(policy))
    modes = [module.training for module in net.modules()]
    with untouched(net):
        path = fbn.save(net, tmp_path / "model.safetensors", classes=CLASSES, transform=SMALL)
    assert [module.training for module in net.modules()] == modes
    x = images()
    with torch.no_grad():
        expected = net.eval()(x)
        loaded = fbn.load(path)
        torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-5)
    assert not any(isinstance(layer, FrozenBatchNorm) for layer in loaded.modules())
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize("affine", ["none", "merged"])
def test_the_file_of_a_frozen_network_is_timms_own(affine: Any, tmp_path: Path) -> None:
    net = trained(network(fbn.Freeze(affine)))
    path = fbn.save(net, tmp_path / "model.safetensors", classes=CLASSES)
    plain = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(path)).eval()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(plain(x), net.eval()(x), rtol=0, atol=1e-5)
        again = fbn.create_backbone("test_resnet", path, num_classes=3).eval()
        assert torch.equal(again(x), plain(x))


def test_a_calibrated_group_norm_keeps_what_was_fitted_and_its_way_back(tmp_path: Path) -> None:
    net = network(fbn.ToGroupNorm(init="sequential"))
    fbn.calibrate_group_norm(net, [torch.randn(16, 3, 32, 32) for _ in range(2)])
    loaded = fbn.load(fbn.save(net, tmp_path / "model.safetensors", classes=CLASSES, transform=SMALL)).net
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), net.eval()(x), rtol=0, atol=1e-5)
        for one, other in zip(loaded.modules(), net.modules(), strict=True):
            if isinstance(other, GroupNorm):
                assert (one.num_groups, one.eps) == (other.num_groups, other.eps)
        torch.testing.assert_close(fbn.revert(loaded)(x), fbn.revert(net)(x), rtol=0, atol=1e-5)


def test_the_plan_in_the_card_makes_the_network_trainable_as_it_was(tmp_path: Path) -> None:
    net = network(fbn.Rules([("layer4.*", fbn.Keep()), ("*", fbn.Freeze("shift"))]))
    model = fbn.load(fbn.save(net, tmp_path / "model.safetensors", classes=CLASSES, transform=SMALL))
    fbn.convert(model.net, model.card.plan)
    assert fbn.status(model.net).to_dict() == fbn.status(net.eval()).to_dict()


@pytest.mark.parametrize("arguments", [{"in_chans": 1}, {"global_pool": "catavgmax"}, {"drop_rate": 0.5}])
def test_what_the_network_was_made_with_comes_back(arguments: dict[str, Any], tmp_path: Path) -> None:
    net = network(**arguments)
    mean = (0.5,) * arguments.get("in_chans", 3)
    path = fbn.save(
        net,
        tmp_path / "model.safetensors",
        arguments={key: value for key, value in arguments.items() if key != "in_chans"},
        transform=Transform((32, 32), mean, mean),
    )
    x = images()[:, : len(mean)]
    with torch.no_grad():
        assert torch.equal(fbn.load(path)(x), net.eval()(x))


def test_an_argument_that_is_missing_is_found_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(FinetuneBNError, match=r"net: got 'ResNet'.*1 of another shape \(fc\.weight"):
        fbn.save(network(global_pool="catavgmax"), path)
    with pytest.raises(ConversionMismatch, match=r"would differ by .* belongs into `arguments`"):
        fbn.save(network(act_layer="silu"), path)
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_head_is_saved_as_embedding_and_scaled_where_asked_for(tmp_path: Path) -> None:
    net = settle(timm.create_model("test_resnet", num_classes=0))
    path = fbn.save(net, tmp_path / "model.safetensors", task="embedding", normalize=True, transform=SMALL)
    model, x = fbn.load(path), images()
    with torch.no_grad():
        torch.testing.assert_close(model(x), nn.functional.normalize(net.eval()(x)))
    assert model.classes == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype_in_the_file_and_are_used_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    net = network(fbn.Freeze("original")).to(dtype)
    path = fbn.save(net, tmp_path / "model.safetensors", transform=SMALL)
    assert safetensors.load_file(path)["fc.weight"].dtype is dtype
    model = fbn.load(path)
    assert model.net.fc.weight.dtype is torch.float32
    with torch.no_grad():
        torch.testing.assert_close(model(images()).to(dtype), net.eval()(images().to(dtype)), rtol=5e-2, atol=5e-2)


def test_saving_and_loading_leave_the_random_state_alone(tmp_path: Path) -> None:
    net, state = network(), torch.get_rng_state()
    fbn.load(fbn.save(net, tmp_path / "model.safetensors", transform=SMALL))
    assert torch.equal(state, torch.get_rng_state())


def test_the_card_tells_classes_transform_versions_and_where_it_is_from(tmp_path: Path) -> None:
    path = fbn.save(network(), tmp_path / "m.safetensors", classes=CLASSES, transform=SMALL, about={"title": "a net"})
    card = fbn.load(path).card
    assert (card.backbone, card.classes, card.transform) == ("test_resnet", tuple(CLASSES), SMALL)
    assert card.about == {"title": "a net"}
    assert card.versions.keys() >= {"python", "torch", "timm"}
    default = fbn.load(fbn.save(network(), path)).card
    assert default.classes == ("0", "1", "2")
    assert default.transform == Transform.from_config(timm.data.resolve_model_data_config(network()))


def test_a_file_is_used_without_lightning(file: Path) -> None:
    code = (
        "import sys, torch, finetune_bn; from PIL import Image; "
        f"model = finetune_bn.load({str(file)!r}); "
        "print(model.predict(Image.new('RGB', (40, 40))).label in model.classes, 'lightning' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.stdout.split() == ["True", "False"], done.stderr


# --- bad input --------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("the file was executed",)


def test_a_pickle_is_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Evil()))
    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    for name, words in (("evil.safetensors", "of another kind"), ("evil.ckpt", "a checkpoint of torch or Lightning")):
        with pytest.raises(BadData, match=words):
            fbn.load(tmp_path / name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1], ids=str)
def test_a_truncated_file_is_one_error(file: Path, kept: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(BadData, match=r"path: got .*model\.safetensors.* It is damaged or of another kind"):
        fbn.load(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: t.pop("layer1.0.bn1.running_mean"), r"1 missing \(layer1\.0\.bn1\.running_mean\)"),
        (lambda t, m: t.update({"fc.bias": torch.zeros(4)}), r"1 of another shape \(fc\.bias \[4\] for \[3\]\)"),
        (lambda t, m: t.update({"more": torch.zeros(4)}), r"1 unexpected \(more\)"),
        (lambda t, m: t["fc.bias"].fill_(float("nan")), r"1 with NaN or an impossible running_var \(fc\.bias\)"),
        (lambda t, m: m.pop("finetune_bn"), "It holds weights alone: finetune_bn.create_backbone"),
        (lambda t, m: m.update(finetune_bn="{"), "Its header cannot be read"),
        (lambda t, m: m.update(finetune_bn="[]"), "Its header cannot be read"),
    ],
)
def test_a_file_that_is_not_whole_is_one_error_that_names_what_is_wrong(file: Path, change: Any, words: str) -> None:
    with pytest.raises(BadData, match=rf"path: got .*model\.safetensors.*{words}"):
        fbn.load(rewritten(file, change))


def edited(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda t, m: m.update(finetune_bn=json.dumps(json.loads(m["finetune_bn"]) | changes))


def test_a_file_of_a_later_version_says_what_to_install(file: Path) -> None:
    change = edited(format=cards.FORMAT + 1, unknown=1, versions={"finetune-bn": "9.1"})
    with pytest.raises(BadData, match=r"It is of format 2, written by finetune-bn 9\.1: pip install --upgrade"):
        fbn.load(rewritten(file, change))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ["a", "b"]}, "classes: got .*3 different names"),
        ({"task": "poetry"}, "task: got 'poetry'"),
        # Found by `make fuzz`.
        ({"arguments": "x"}, "arguments: got 'x'"),
        ({"backbone": 1}, "backbone: got 1"),
        ({"normalize": "yes"}, "normalize: got 'yes'"),
        ({"about": []}, "about: got"),
        ({"in_chans": 2**40}, "in_chans=1099511627776, and no tensor in it has as many values"),
        ({"transform": {"size": [10**9, 1], "mean": [0.5], "std": [0.5]}}, "transform.size: got"),
        ({"transform": {"size": [32, 32], "mean": ["x"], "std": [0.5]}}, "transform.mean: got"),
        (
            {"transform": {"size": [32, 32], "mean": [0.5, 0.5], "std": [0.5]}},
            "transform.std: got .* 2 numbers, as in mean",
        ),
        ({"transform": {"size": [32, 32], "mean": [0.5], "std": [0.5], "crop_mode": 3}}, "transform.crop_mode: got 3"),
        ({"num_classes": 1, "classes": ["a"]}, "num_classes: got 1; allowed: 2 or more. Or task='embedding'"),
        ({"unknown": 1}, "unexpected keyword argument 'unknown'"),
        ({"plan": {"model": "x"}}, "plan: got"),
        ({"backbone": "hf-hub:someone/net"}, "backbone: got 'hf-hub:someone/net'"),
        ({"backbone": "resnet9000"}, "name: got 'resnet9000'"),
        ({"arguments": {"checkpoint_path": "/tmp/evil.pth"}}, r"timm_kwargs\.checkpoint_path: got"),
        ({"arguments": {"pretrained": True}}, r"timm_kwargs\.pretrained: got True"),
    ],
)
def test_a_card_that_says_nonsense_is_one_error_and_leads_to_no_other_file(
    file: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(FinetuneBNError, match=words):
        fbn.load(rewritten(file, edited(**changes)))


@pytest.mark.parametrize("path", ["missing.safetensors", ".", 3])
def test_what_is_no_file_is_refused_by_name(path: Any) -> None:
    with pytest.raises(BadData, match=r"path: got .* There is no such file"):
        fbn.load(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"classes": ["a", "b"]}, r"classes: got \['a', 'b'\]; allowed: 3 different names"),
        ({"classes": ["a", "a", "b"]}, "classes: got"),
        ({"task": "regression"}, "task: got 'regression'"),
        ({"arguments": {"act_layer": nn.ReLU}}, r"arguments: got .* allowed: plain data"),
        ({"backbone": "test_efficientnet"}, "net: got 'ResNet'"),
    ],
)
def test_a_wrong_argument_is_named_and_the_old_file_stays(file: Path, arguments: dict[str, Any], words: str) -> None:
    before = file.read_bytes()
    with pytest.raises(FinetuneBNError, match=words):
        fbn.save(network(), file, **{"transform": SMALL, **arguments})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_size_that_the_network_does_not_take_is_found_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(FinetuneBNError, match=r"transform\.size: got \(32, 32\); allowed: a size that vit_tiny"):
        fbn.save(
            timm.create_model("vit_tiny_patch16_224", num_classes=3), tmp_path / "model.safetensors", transform=SMALL
        )
    assert list(tmp_path.iterdir()) == []


def test_a_network_with_nan_or_none_of_timms_is_not_saved(tmp_path: Path) -> None:
    net = network()
    nn.init.constant_(net.fc.bias, float("nan"))
    with pytest.raises(FinetuneBNError, match=r"with NaN or an impossible running_var \(fc\.bias\)"):
        fbn.save(net, tmp_path / "model.safetensors")
    with pytest.raises(FinetuneBNError, match="net: got 'Linear'; allowed: a timm model"):
        fbn.save(nn.Linear(3, 3), tmp_path / "model.safetensors")
    with pytest.raises(FinetuneBNError, match=r"path: got .* allowed: a file that can be written"):
        fbn.save(network(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_settings_of_a_group_norm_cannot_get_lost(tmp_path: Path) -> None:
    file = fbn.save(network(fbn.ToGroupNorm(groups=4)), tmp_path / "model.safetensors", transform=SMALL)
    name = next(name for name in safetensors.load_file(file) if name.endswith("_extra_state"))
    rewritten(file, lambda tensors, metadata: tensors.pop(name))
    with pytest.raises(BadData, match=rf"1 missing \({name}\)"):
        fbn.load(file)
    rewritten(file, lambda tensors, metadata: tensors.update({name: torch.zeros(3, dtype=torch.uint8)}))
    with pytest.raises(BadData, match=name.rpartition(".")[0]):
        fbn.load(file)


def test_without_safetensors_it_is_said_what_to_install_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingDependency, match="pip install safetensors"):
        fbn.save(network(), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_is_named(file: Path) -> None:
    with pytest.raises(FinetuneBNError, match=r"device: got 'toaster'; allowed: a device of this machine: cpu"):
        fbn.load(file, device="toaster")
    assert_same_state(fbn.load(file, device="cpu").state_dict(), fbn.load(file).state_dict())
