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
from finetune_bn.functional.group_norm import closed_form, group_statistics
from finetune_bn.layers import EvalBatchNorm2d, GroupNorm, GroupNormAct2d
from finetune_bn.layers.extra_state import pack, unpack
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
    assert list(layer.state_dict()) == ["weight", "bias", "_extra_state"]


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


def test_center_subtracts_an_images_mean_and_is_a_frozen_batch_norm_otherwise() -> None:
    bn = make(eps=1e-3).double()
    x = 3 * images().double()
    layer = GroupNorm.from_batch_norm(bn, 2, eps="center")
    scale, shift = scale_shift(bn.weight, bn.bias, bn.running_mean, bn.running_var, 1e-3)
    means = x.view(4, 2, -1).mean(2).repeat_interleave(4, 1)
    expected = bn.running_mean.view(2, -1).mean(1).repeat_interleave(4)
    reference = (x - (means - expected)[..., None, None]) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    torch.testing.assert_close(layer(x), reference, rtol=1e-2, atol=1e-2)
    assert (layer(x) - reference).abs().max() < 0.01 * (bn(x) - reference).abs().max()


def test_own_is_indifferent_to_the_size_of_its_input_and_center_follows_it() -> None:
    bn, x = make(eps=1e-5), images()
    own, center = (GroupNorm.from_batch_norm(bn, 2, eps=eps) for eps in ("own", "center"))
    torch.testing.assert_close(own(1.5 * x), own(x), rtol=1e-3, atol=1e-3)
    away, further = (center(t) - center.bias.view(-1, 1, 1) for t in (x, 1.5 * x))
    torch.testing.assert_close(further, 1.5 * away, rtol=1e-2, atol=1e-2)


def test_until_images_tell_eps_is_the_batch_norms_but_for_center() -> None:
    bn = make(eps=1e-3)
    assert {GroupNorm.from_batch_norm(bn, 2, eps=eps).eps for eps in ("own", "normalize", "auto")} == {1e-3}
    layer = GroupNorm.from_batch_norm(bn, 2, eps="center")
    _, variance = group_statistics(bn.running_mean, bn.running_var, 2)
    assert layer.eps == pytest.approx(1e-3 + 1e4 * float(variance.mean()))
    assert GroupNorm.from_batch_norm(make(eps=1e-3).to("meta"), 2, eps="center").eps == 1e-3


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


def test_a_layer_made_as_such_has_the_state_dict_of_torchs_group_norm_and_back() -> None:
    layer, torchs, x = GroupNorm(2, 8), nn.GroupNorm(2, 8), images()
    with torch.no_grad():
        layer.weight.mul_(3)
    torchs.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(torchs(x), layer(x))
    other = GroupNorm(2, 8)
    other.load_state_dict(torchs.state_dict(), strict=True)
    assert torch.equal(other(x), layer(x))


def test_torchs_group_norm_does_not_take_a_converted_layers_state_for_its_own() -> None:
    with pytest.raises(RuntimeError, match="_extra_state"):
        nn.GroupNorm(2, 8).load_state_dict(GroupNorm.from_batch_norm(make(), 4).state_dict(), strict=True)


def settled(seed: int = 0) -> GroupNorm:
    """Return a converted layer with every fact that it can have, none of it the default."""
    bn = settle(nn.BatchNorm2d(8, eps=1e-3), seed)
    layer = GroupNorm.from_batch_norm(bn, 4, eps=0.5)
    layer.alpha = 0.25
    layer.balance = ("..conv", torch.tensor([1.0, -2.0, 0.5, 4.0, -8.0, 1.0, 2.0, -0.25]))
    return layer


def half_and_back(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.half().to(value.dtype if name != "_extra_state" else torch.float32) for name, value in state.items()
    }


WAYS: dict[str, Any] = {
    "as it is": lambda state: state,
    "dict": dict,
    "stripped": lambda state: {k.removeprefix("m."): v for k, v in {f"m.{k}": v for k, v in state.items()}.items()},
    "safetensors": lambda state: safetensors_of(state),
    "in half precision": half_and_back,
    "in bfloat16": lambda state: {name: value.bfloat16() for name, value in state.items()},
}


def safetensors_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    torch_files = pytest.importorskip("safetensors.torch")
    return torch_files.load(torch_files.save(dict(state)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", WAYS)
def test_groups_eps_balance_alpha_and_the_batch_norm_come_along_whatever_copies_the_state_dict(way: str) -> None:
    layer, other = settled(), GroupNorm.from_batch_norm(nn.BatchNorm2d(8), "auto")
    other.load_state_dict(WAYS[way](layer.state_dict()), strict=True)
    assert (other.num_groups, other.eps, other.alpha) == (4, 0.5, 0.25)
    assert layer.balance is not None
    assert other.balance is not None
    assert other.balance[0] == "..conv"
    assert torch.equal(other.balance[1].float(), layer.balance[1])
    coarse = way.startswith("in ")
    torch.testing.assert_close(other(images()), layer(images()), rtol=0.02 if coarse else 0, atol=0.05 if coarse else 0)
    expected = layer.to_batch_norm().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.to_batch_norm().state_dict().items())


def old_file(layer: GroupNorm) -> dict[str, Any]:
    """Return the state dict as versions before the tensor of bytes wrote it, with their metadata."""
    state = layer.state_dict()
    del state["_extra_state"]
    source = {name: value.clone() for name, value in layer._source[0].state_dict().items()}
    facts = {"num_groups": layer.num_groups, "eps": layer.eps, "alpha": layer.alpha, "source": source}
    state._metadata[""]["finetune_bn"] = facts | {"balance": layer.balance}
    return state  # type: ignore[no-any-return]


@pytest.mark.parametrize("without", [(), ("eps",), ("eps", "balance")], ids=str)
def test_a_file_of_an_older_version_loads_by_its_metadata(without: tuple[str, ...]) -> None:
    layer, other = settled(), settled(1)
    state = old_file(layer)
    for name in without:
        del state._metadata[""]["finetune_bn"][name]  # type: ignore[attr-defined]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other.balance = None
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert (other.num_groups, other.eps, other.alpha) == (4, 0.5, 0.25)
    assert (other.balance is None) == ("balance" in without)
    expected = layer.to_batch_norm().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.to_batch_norm().state_dict().items())


def spoiled(**changes: Any) -> Any:
    """Return what changes one fact of a state dict."""

    def change(state: dict[str, Any]) -> dict[str, Any]:
        facts, tensors = unpack(state["_extra_state"])
        for name, value in changes.items():
            if isinstance(value, Tensor):
                tensors[name] = value
            else:
                facts[name] = value
        return {**state, "_extra_state": pack(facts, tensors)}

    return change


REFUSED: dict[str, tuple[Any, str]] = {
    "torch.nn.GroupNorm": (
        lambda s: nn.GroupNorm(4, 8).state_dict(),
        "without the number of groups.*torch.nn.GroupNorm",
    ),
    "an old file's dict": (lambda s: dict(old_file(settled())), "copied without its metadata"),
    "BatchNorm": (lambda s: make().state_dict(), "was converted to GroupNorm"),
    "another width": (
        lambda s: GroupNorm.from_batch_norm(nn.BatchNorm2d(4), 2).state_dict(),
        "size mismatch for weight",
    ),
    "groups that do not divide": (spoiled(num_groups=3), "3 groups, and the layer 8 channels"),
    "groups of another kind": (spoiled(num_groups=2.0), r"2\.0 groups"),
    "eps": (spoiled(eps=float("nan")), "eps=nan"),
    "alpha": (spoiled(alpha=2.0), "alpha=2.0"),
    "factors": (spoiled(factors=torch.ones(3, dtype=torch.float64), balanced="..conv"), "size mismatch for factors"),
    "source": (spoiled(running_mean=torch.ones(3)), "size mismatch for BatchNorm running_mean"),
    "averaged": (lambda s: {**s, "_extra_state": s["_extra_state"].double() * 0.999}, "numbers that are no bytes"),
    "cut off": (lambda s: {**s, "_extra_state": s["_extra_state"][:-3]}, "not whole"),
    "too long": (lambda s: {**s, "_extra_state": torch.cat([s["_extra_state"]] * 2)}, "not whole"),
    "noise": (lambda s: {**s, "_extra_state": torch.zeros(40, dtype=torch.uint8)}, "does not begin with the format"),
    "an object": (lambda s: {**s, "_extra_state": {"num_groups": 2}}, "no tensor of bytes"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_known_is_refused_by_name_and_the_layer_stays_as_it_was(case: str, strict: bool) -> None:
    change, message = REFUSED[case]
    net, other = nn.Sequential(settled()), settled(1)
    before = copy.deepcopy((net.state_dict(), net[0].to_batch_norm().state_dict()))
    state = {f"0.{name}": value for name, value in change(other.state_dict()).items()}
    with pytest.raises(RuntimeError, match=rf"(?s)\b0: .*{message}"):
        net.load_state_dict(state, strict=strict)
    for now, then in zip((net.state_dict(), net[0].to_batch_norm().state_dict()), before, strict=True):
        assert all(torch.equal(now[name], value) for name, value in then.items())


def test_the_packed_tensor_is_of_one_size_whatever_the_facts_are() -> None:
    # Weight averaging copies one network's state dict into another's, tensor by tensor.
    plain = GroupNorm.from_batch_norm(settle(nn.BatchNorm2d(8)), 1)
    assert plain.state_dict()["_extra_state"].shape == settled().state_dict()["_extra_state"].shape


def test_a_layer_on_the_meta_device_takes_a_file() -> None:
    with torch.device("meta"):
        layer = GroupNorm.from_batch_norm(nn.BatchNorm2d(8), "auto")
    assert list(layer.state_dict()) == ["weight", "bias", "_extra_state"]
    layer.load_state_dict(settled().state_dict(), strict=True, assign=True)
    assert torch.equal(layer(images()), settled()(images()))
    expected = settled().to_batch_norm().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in layer.to_batch_norm().state_dict().items())


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
        ({"eps": "small"}, "eps: got 'small'; allowed: 'auto', 'own', 'normalize', 'center', or a number above 0"),
        ({"eps": "center", "init": "copy"}, "init: got 'copy'.*next to nothing"),
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


@pytest.mark.parametrize("kind", ["group norm", "eval norm"])
def test_torchs_distributed_checkpoint_carries_it(kind: str, tmp_path: Any) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    def net(seed: int, *settings: float) -> nn.Module:
        bn = settle(nn.BatchNorm2d(8), seed)
        layer = GroupNorm.from_batch_norm(bn, int(settings[0]), eps=settings[1])  # type: ignore[arg-type]
        return nn.Sequential(layer if kind == "group norm" else EvalBatchNorm2d.from_batch_norm(bn, settings[1])).eval()  # type: ignore[arg-type]

    model, one, two = net(0, 4, 0.25), net(1, 1, 0.5), net(2, 2, 0.125)
    set_model_state_dict(one, get_model_state_dict(model))
    dcp.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state = two.state_dict()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    two.load_state_dict(state)
    for other in (one, two):
        assert torch.equal(other(images()), model(images()))
