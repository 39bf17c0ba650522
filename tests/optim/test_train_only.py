"""Norm-only fine-tuning: what is trained, what goes into the file, and several files on one backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.errors import BadData, FinetuneBNError
from finetune_bn.optim.trained_part import trained_state
from tests.models import IMAGE, Plain, settle
from tests.tools import assert_same_state

NORMS = ["bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"]
HEAD = ["head.weight", "head.bias"]


class Wrapped(nn.Module):
    """A network under a name of its own, with a head beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Plain()
        self.net.head = nn.Identity()
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.net(x))


def plain(policy: fbn.Policy | None = None) -> nn.Module:
    torch.manual_seed(0)
    net = settle(Plain())
    return net if policy is None else fbn.convert(net, policy, verify=False)


def trained(net: nn.Module, seed: int, what: Any = "norm") -> nn.Module:
    """Fine-tune a part of it for three steps."""
    fbn.train_only(net, what)
    x = torch.randn(IMAGE, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(x), torch.arange(len(x)) % 3).backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("policy", [None, fbn.Freeze("original"), fbn.Freeze("merged"), fbn.Ghost(2)], ids=str)
def test_norm_trains_gamma_and_beta_and_the_head_and_affine_these_alone(policy: fbn.Policy | None) -> None:
    net = plain(policy)
    for what, names in (("norm", [*NORMS, *HEAD]), ("affine", NORMS)):
        found = fbn.train_only(net, what)
        assert sorted(found.names) == sorted(names)
        assert {name for name, p in net.named_parameters() if p.requires_grad} == set(names)
        assert found.parameters == sum(p.numel() for p in net.parameters() if p.requires_grad)
        assert f"{len(names)} parameters are trained" in str(found)


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("conv2", ["conv2.weight"]),
        ("*.bias", ["bn1.bias", "bn2.bias", "head.bias"]),
        (["bn?", "head.weight"], [*NORMS, "head.weight"]),
    ],
)
def test_patterns_name_parameters_or_the_modules_that_hold_them(what: Any, names: list[str]) -> None:
    assert sorted(fbn.train_only(plain(), what).names) == sorted(names)


def test_a_shift_trains_beta_alone_and_layernorm_counts_as_a_norm_layer() -> None:
    assert set(fbn.train_only(plain(fbn.Freeze("shift"))).names) == {"bn1.bias", "bn2.bias", *HEAD}
    other = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    assert fbn.train_only(other, "affine").names == ("1.weight", "1.bias")


def test_a_gradient_of_what_is_no_longer_trained_is_forgotten() -> None:
    net = plain()
    net(torch.randn(IMAGE)).sum().backward()
    before = net.conv1.weight.detach().clone()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    fbn.train_only(net)
    optimizer.step()
    assert torch.equal(net.conv1.weight, before)


@pytest.mark.parametrize("policy", [fbn.Freeze("none"), fbn.FreezeAffine()], ids=str)
def test_constants_cannot_be_trained_and_the_error_says_what_to_convert_to(policy: fbn.Policy) -> None:
    net = plain(policy)
    before = [p.requires_grad for p in net.parameters()]
    with pytest.raises(FinetuneBNError, match=r"model: got .Plain with .*constants: convert with Freeze\('original'\)"):
        fbn.train_only(net)
    assert [p.requires_grad for p in net.parameters()] == before


@pytest.mark.parametrize("what", ["norms", ["bn1", "layer9"], [], 3, None])
def test_a_pattern_that_matches_nothing_and_a_wrong_type_change_nothing(what: Any) -> None:
    net = plain()
    with pytest.raises(FinetuneBNError, match=r"what: got .*allowed: 'norm', 'affine', or patterns"):
        fbn.train_only(net, what)
    assert all(p.requires_grad for p in net.parameters())


def test_without_a_head_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    net = fbn.train_only(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    assert net.names == ("1.weight", "1.bias")
    assert "no head was found in Sequential" in caplog.text


# The file


@pytest.mark.parametrize("of", [fbn.Freeze("original"), fbn.Freeze("merged"), fbn.Freeze("shift"), None], ids=str)
@pytest.mark.parametrize("onto", [fbn.Freeze("none"), fbn.Freeze("merged"), None], ids=str)
def test_the_file_makes_the_trained_network_of_a_backbone_however_that_is_converted(
    of: fbn.Policy | None, onto: fbn.Policy | None, tmp_path: Path
) -> None:
    net, backbone = trained(plain(of), 1), plain(onto)
    size = fbn.save_trained(net, tmp_path / "deep" / "part.safetensors")
    assert size == (tmp_path / "deep" / "part.safetensors").stat().st_size
    x = torch.randn(IMAGE)
    assert not torch.allclose(backbone.eval()(x), net.eval()(x), atol=1e-2)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    names = fbn.apply_trained(backbone, tmp_path / "deep" / "part.safetensors")
    assert {"bn1.weight", "head.bias"} <= set(names)
    torch.testing.assert_close(backbone(x), net(x), rtol=1e-5, atol=1e-5)
    assert fbn.remove_trained(backbone)
    assert_same_state(backbone.state_dict(), before)
    assert not fbn.remove_trained(backbone)


def test_several_are_applied_in_turn_each_as_if_it_were_the_only_one(tmp_path: Path) -> None:
    policy = fbn.Freeze("original")
    one, two = trained(plain(policy), 1), trained(plain(policy), 2, ["bn2", "head"])
    three = plain(policy)
    three.head = nn.Linear(8, 7)
    three = trained(three, 3)
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for net, path in zip((one, two, three), paths, strict=True):
        fbn.save_trained(net, path)
    backbone, x = plain(fbn.Freeze("none")), torch.randn(IMAGE)
    own = backbone.eval()(x)
    for i in (0, 1, 2, 0, 2, 1):
        fbn.apply_trained(backbone, paths[i])
        torch.testing.assert_close(backbone(x), (one, two, three)[i].eval()(x), rtol=1e-5, atol=1e-5)
    fbn.remove_trained(backbone)
    assert torch.equal(backbone(x), own)
    assert backbone.head.out_features == 5


def test_live_statistics_are_part_of_what_was_trained() -> None:
    net = trained(plain(), 1, "head")
    assert "bn1.running_mean" in trained_state(net)
    frozen = trained(plain(fbn.Freeze("none")), 1, "head")
    assert set(trained_state(frozen)) == set(HEAD)


def test_the_name_of_a_wrapper_in_front_does_not_matter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wrapped = Wrapped()
    assert {"classifier.weight", "net.bn1.weight"} <= set(fbn.train_only(wrapped).names)
    fbn.train_only(wrapped, "net.bn*")
    fbn.save_trained(wrapped, tmp_path / "part.safetensors")
    backbone = Plain()
    assert "bn1.weight" in fbn.apply_trained(backbone, tmp_path / "part.safetensors")
    assert torch.equal(backbone.bn1.weight, wrapped.net.bn1.weight)


def test_resnet50s_norm_layers_and_a_head_are_under_a_megabyte(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    net = fbn.convert(timm.create_model("resnet50", num_classes=37), fbn.Freeze("original", fold="never"), verify=False)
    found = fbn.train_only(net)
    assert {"fc.weight", "fc.bias"} <= set(found.names)
    assert found.parameters == 2 * 26560 + 37 * 2049
    assert fbn.save_trained(net, tmp_path / "part.safetensors") < 1_000_000


@pytest.mark.parametrize("case", ["other net", "other width", "whole network", "broken", "missing"])
def test_what_does_not_fit_is_refused_and_the_model_is_as_it_was(case: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "part.safetensors"
    net = trained(plain(fbn.Freeze("original")), 1)
    backbone = plain()
    if case == "other net":
        fbn.save_trained(
            trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(196, 3)), 1), path
        )
    elif case == "other width":
        fbn.save_trained(net, path)
        backbone.bn2, backbone.conv2 = nn.BatchNorm2d(9), nn.Conv2d(6, 9, 3)
    elif case == "whole network":
        save_file(net.state_dict(), path)
    elif case == "broken":
        path.write_bytes(b"no tensors")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(FinetuneBNError, match="trained: got") as raised:
        fbn.apply_trained(backbone, path)
    assert isinstance(raised.value, BadData) == (case in ("whole network", "broken", "missing"))
    assert_same_state(backbone.state_dict(), before)


def test_saving_needs_something_trained_and_the_right_suffix(tmp_path: Path) -> None:
    net = plain()
    with pytest.raises(FinetuneBNError, match=r"path: got '.*part.pt'; allowed: a path that ends in .safetensors"):
        fbn.save_trained(net, tmp_path / "part.pt")
    net.requires_grad_(False)
    with pytest.raises(FinetuneBNError, match="model: got 'Plain'; allowed: a model that trains something"):
        fbn.save_trained(net, tmp_path / "part.safetensors")
    assert list(tmp_path.iterdir()) == []
