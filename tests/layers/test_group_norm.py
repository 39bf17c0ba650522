"""GroupNorm made from a BatchNorm: what it computes, what it keeps, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune_bn.errors import FinetuneBNError
from finetune_bn.functional.frozen import scale_shift
from finetune_bn.functional.group_norm import closed_form
from finetune_bn.layers import GroupNorm, GroupNormAct2d
from finetune_bn.layers.group_norm import number_of_groups, why_not_group_norm
from tests.models import settle

KINDS = {
    "1d": (nn.BatchNorm1d, (4, 8)),
    "sequence": (nn.BatchNorm1d, (4, 8, 5)),
    "2d": (nn.BatchNorm2d, (4, 8, 3, 3)),
    "3d": (nn.BatchNorm3d, (4, 8, 2, 3, 3)),
    "sync": (nn.SyncBatchNorm, (4, 8, 3, 3)),
}


def make(kind: type[nn.Module] = nn.BatchNorm2d, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return settle(kind(8, **arguments)).eval()


def images(shape: tuple[int, ...] = (4, 8, 3, 3)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def norm_act() -> Any:
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    return settle(BatchNormAct2d(8, act_layer=nn.PReLU, drop_layer=nn.Dropout)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_torchs_group_norm_with_the_weights_of_the_closed_form(kind: str) -> None:
    bn, x = make(KINDS[kind][0], eps=1e-3), images(KINDS[kind][1])
    layer = GroupNorm.from_batch_norm(bn, 2)
    scale, shift = scale_shift(bn.weight, bn.bias, bn.running_mean, bn.running_var, 1e-3)
    weight, bias = closed_form(scale, shift, bn.running_mean, bn.running_var, 2, 1e-3)
    torch.testing.assert_close(layer(x), F.group_norm(x, 2, weight, bias, 1e-3))
    assert isinstance(layer, nn.GroupNorm)
    assert not isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert list(layer.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("training", [True, False])
def test_an_images_output_does_not_depend_on_the_others_nor_on_the_mode(training: bool) -> None:
    layer, x = GroupNorm.from_batch_norm(make(), 2).train(training), images()
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))


def test_reset_and_copy_start_where_they_say() -> None:
    bn = make()
    reset, copied = (GroupNorm.from_batch_norm(bn, 2, init=init) for init in ("reset", "copy"))  # type: ignore[arg-type]
    assert torch.equal(reset.weight, torch.ones(8))
    assert torch.equal(reset.bias, torch.zeros(8))
    assert torch.equal(copied.weight, bn.weight)
    assert torch.equal(copied.bias, bn.bias)
    assert copied.weight is not bn.weight


def test_sequential_starts_as_the_closed_form() -> None:
    bn = make()
    pair = [GroupNorm.from_batch_norm(bn, 2, init=init) for init in ("closed_form", "sequential")]  # type: ignore[arg-type]
    assert torch.equal(pair[0].weight, pair[1].weight)


@pytest.mark.parametrize("init", ["closed_form", "reset", "copy"])
def test_without_affine_weight_and_bias_are_constants(init: Any) -> None:
    """opacus leaves out weight and bias here; they carry the statistics, so they are there, and are not trained."""
    layer = GroupNorm.from_batch_norm(make(affine=False), 2, init=init)
    assert not list(layer.parameters())
    assert [name for name, _ in layer.named_buffers()] == ["weight", "bias"]
    assert layer(images()).shape == (4, 8, 3, 3)


def test_dtype_device_eps_mode_and_requires_grad_come_along() -> None:
    bn = make(eps=1e-2, dtype=torch.bfloat16).train()
    bn.weight.requires_grad_(False)
    layer = GroupNorm.from_batch_norm(bn, 4)
    assert (layer.weight.dtype, layer.eps, layer.training) == (torch.bfloat16, 1e-2, True)
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)
    meta = GroupNorm.from_batch_norm(nn.BatchNorm2d(8, device="meta"), 4)
    assert meta.weight.is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_in_half_precision_stay_so_under_float32_parameters_and_autocast(dtype: torch.dtype) -> None:
    layer, x = GroupNorm.from_batch_norm(make(), 2), images().to(dtype)
    assert layer(x).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == dtype


def test_hooks_come_along_and_go_back() -> None:
    bn, calls = make(), []
    handle = bn.register_forward_hook(lambda module, args, y: calls.append(type(module).__name__))
    layer = GroupNorm.from_batch_norm(bn, 2)
    layer(images())
    layer.to_batch_norm()(images())
    handle.remove()
    layer(images())
    assert calls == ["GroupNorm", "BatchNorm2d"]


@pytest.mark.parametrize("make_bn", [make, norm_act], ids=["plain", "norm_act"])
def test_the_batch_norm_comes_back_bit_for_bit_also_from_a_copy_and_a_file(make_bn: Any) -> None:
    bn = make_bn()
    before = {name: value.clone() for name, value in bn.state_dict().items()}
    kind = GroupNormAct2d if hasattr(bn, "act") else GroupNorm
    layer = kind.from_batch_norm(bn, 2)
    with torch.no_grad():
        layer.weight.add_(1)
    for one in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer):
        back = one.to_batch_norm()
        assert type(back) is type(bn)
        assert all(torch.equal(value, before[name]) for name, value in back.state_dict().items())
    assert back is bn


def test_norm_act_applies_drop_and_act_of_its_source() -> None:
    bn, x = norm_act(), images()
    layer = GroupNormAct2d.from_batch_norm(bn, 2)
    plain = GroupNorm.from_batch_norm(bn, 2)
    assert layer.act is bn.act
    torch.testing.assert_close(layer.eval()(x), bn.act(plain(x)))
    fresh = GroupNormAct2d(2, 8, act=nn.ReLU())
    torch.testing.assert_close(fresh(x), F.group_norm(x, 2).relu())


def test_a_state_dict_goes_to_torchs_group_norm_and_back() -> None:
    layer, x = GroupNorm.from_batch_norm(make(eps=1e-5), 2), images()
    torchs = nn.GroupNorm(2, 8)
    torchs.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(torchs(x), layer(x))
    other = GroupNorm.from_batch_norm(make(eps=1e-5), 2, init="reset")
    other.load_state_dict(torchs.state_dict(), strict=True)
    assert torch.equal(other(x), layer(x))


def test_a_file_carries_the_number_of_groups_eps_and_the_batch_norm() -> None:
    layer = GroupNorm.from_batch_norm(make(), 4, eps=0.5)
    layer.alpha = 0.25
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = GroupNorm.from_batch_norm(nn.BatchNorm2d(8), "auto")
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert (other.num_groups, other.eps, other.alpha) == (4, 0.5, 0.25)
    assert torch.equal(other(images()), layer(images()))
    expected = layer.to_batch_norm().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.to_batch_norm().state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
def test_a_batch_norms_state_dict_is_refused_and_not_taken_for_one_of_group_norm(strict: bool) -> None:
    layer = GroupNorm.from_batch_norm(make(), 4)
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match="was converted to GroupNorm"):
        layer.load_state_dict(make().state_dict(), strict=strict)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("make_bn", [make, norm_act], ids=["plain", "norm_act"])
def test_alpha_blends_from_the_frozen_batch_norm_to_group_norm(make_bn: Any) -> None:
    bn, x = make_bn(), images()
    kind = GroupNormAct2d if hasattr(bn, "act") else GroupNorm
    layer = kind.from_batch_norm(bn, 2)
    ends = {}
    for alpha in (1.0, 0.5, 0.0):
        layer.alpha = alpha
        ends[alpha] = layer(x)
    torch.testing.assert_close(ends[1.0], bn(x))
    assert not torch.allclose(ends[0.0], ends[1.0], atol=0.05)
    if kind is GroupNorm:
        torch.testing.assert_close(ends[0.5], (ends[0.0] + ends[1.0]) / 2)


def test_alpha_trains_group_norm_and_not_the_batch_norm() -> None:
    bn = make()
    layer = GroupNorm.from_batch_norm(bn, 2)
    layer.alpha = 0.5
    layer(images()).square().sum().backward()
    assert layer.weight.grad is not None
    assert bn.weight.grad is None


def test_it_is_traced_scripted_and_exported_as_it_computes() -> None:
    layer, x = GroupNorm.from_batch_norm(make(), 2), images()
    expected = layer(x)
    assert torch.equal(torch.jit.trace(layer, x)(x), expected)
    assert torch.equal(torch.jit.script(layer)(x), expected)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), expected)


@pytest.mark.parametrize(
    ("channels", "groups", "per_group", "expected"),
    [
        (24, 32, None, 8),
        (64, 32, None, 32),
        (24, "auto", None, 1),
        (24, "auto", 1, 24),
        (24, "auto", 16, 3),
        (7, 2, None, 1),
    ],
)
def test_number_of_groups_is_the_greatest_that_fits(
    channels: int, groups: Any, per_group: int | None, expected: int
) -> None:
    assert number_of_groups(channels, groups, per_group) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 0}, "groups: got 0"),
        ({"groups": True}, "groups: got True"),
        ({"groups": 2.0}, "groups: got 2.0"),
        ({"groups": "two"}, "groups: got 'two'"),
        ({"channels_per_group": 0}, "channels_per_group: got 0"),
        ({"groups": 2, "channels_per_group": 2}, "Give one"),
        ({"init": "random"}, "'closed_form'"),
        ({"eps": 0}, "eps: got 0"),
        ({"eps": True}, "eps: got True"),
        ({"eps": "small"}, "eps: got 'small'"),
    ],
)
def test_a_wrong_argument_is_one_clear_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuneBNError, match=message):
        GroupNorm.from_batch_norm(make(), **arguments)


def test_the_closed_form_needs_statistics_and_reset_does_not() -> None:
    bn = nn.BatchNorm2d(8, track_running_stats=False)
    assert "track_running_stats=False" in (why_not_group_norm(bn, "closed_form") or "")
    assert why_not_group_norm(bn, "reset") is None
    assert GroupNorm.from_batch_norm(bn, 2, init="copy").to_batch_norm() is bn
    bad = make()
    bad.running_var[0] = float("nan")
    assert "running_var" in (why_not_group_norm(bad, "sequential") or "")
