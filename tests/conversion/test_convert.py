"""Conversion and its undoing: all or nothing, the same outputs, the same everything else."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import finetune_bn as fbn
import finetune_bn.layers.frozen as frozen_layers
from finetune_bn.conversion.plan import Plan
from finetune_bn.conversion.policies import Policy, Rule
from finetune_bn.errors import ConversionMismatch, FinetuneBNError, NoBatchNormMatched, UnsupportedLayer
from finetune_bn.functional.frozen import TOLERANCE, canonicalize
from finetune_bn.layers import FrozenBatchNorm, FrozenBatchNorm2d, FrozenBatchNormAct2d
from finetune_bn.layers.frozen import AFFINE_KINDS, LEARNABLE, Affine
from finetune_bn.layers.hold_affine import is_held
from tests.models import NETS, UNFREEZABLE, AsksForItsType, Plain, Tied, build, settle, with_norm, without_bias
from tests.tools import assert_same_state, saved_bytes, untouched

MERGED, CHANGE = fbn.Freeze("merged"), fbn.NormalizeOnly(change_function=True)


@pytest.fixture(params=AFFINE_KINDS)
def affine(request: pytest.FixtureRequest) -> Affine:
    return request.param


def norm_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (_BatchNorm, FrozenBatchNorm))]


def quiet(model: nn.Module) -> nn.Module:
    """Switch off what is random in training mode, so that training outputs can be compared."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


def train_a_little(model: nn.Module, x: Tensor) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return
    optimizer = torch.optim.SGD(trained, lr=0.03)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


# Freezing


@pytest.mark.parametrize("net", NETS)
def test_a_frozen_network_computes_in_training_what_it_computed_in_evaluation(net: str, affine: Affine) -> None:
    model, x = build(net)
    expected = quiet(model).eval()(x)
    model = fbn.convert(model.train(), fbn.Freeze(affine), example_input=x)
    assert all(isinstance(layer, FrozenBatchNorm) for layer in norm_layers(model))
    assert model.training
    for mode in (True, False):
        assert_close(model.train(mode)(x), expected)


@pytest.mark.parametrize("net", NETS)
def test_checkpoints_load_strictly_both_ways_and_compute_the_same(net: str, affine: Affine) -> None:
    vanilla, x = build(net)
    converted = fbn.convert(settle(build(net)[0], seed=3), fbn.Freeze(affine))
    converted.load_state_dict(vanilla.state_dict(), strict=True)
    assert_close(converted.eval()(x), vanilla.eval()(x))
    train_a_little(quiet(converted), x)
    back = build(net)[0]
    back.load_state_dict(converted.state_dict(), strict=True)
    assert torch.equal(back.eval()(x), converted.eval()(x))


@pytest.mark.parametrize("net", NETS)
def test_an_untouched_network_reverts_bit_for_bit_to_the_objects_it_was(net: str, affine: Affine) -> None:
    model, x = build(net)
    layers, parameters = norm_layers(model), list(model.parameters())
    before = copy.deepcopy(model.state_dict())
    model = fbn.revert(fbn.convert(model, fbn.Freeze(affine), example_input=x), example_input=x)
    assert all(now is then for now, then in zip(norm_layers(model), layers, strict=True))
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize("net", NETS)
def test_a_trained_network_reverts_to_batch_norm_of_the_same_function(net: str, affine: Affine) -> None:
    model, x = build(net)
    model = quiet(fbn.convert(model, fbn.Freeze(affine), example_input=x))
    train_a_little(model, x)
    expected = model.eval()(x).detach()
    model = fbn.revert(model, example_input=x)
    assert all(isinstance(layer, _BatchNorm) for layer in norm_layers(model))
    assert_close(model.eval()(x), expected)
    if net != "momentum_none" and x.dim() > 2:
        model.train()(x)  # and it is a live BatchNorm again
        assert not torch.equal(norm_layers(model)[0].running_mean, norm_layers(build(net)[0])[0].running_mean)


def test_training_a_frozen_network_moves_exactly_what_the_policy_says(affine: Affine) -> None:
    model, x = build("plain")
    fbn.convert(model, fbn.Freeze(affine), example_input=x)
    before = copy.deepcopy(model.state_dict())
    train_a_little(model.train(), x)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    learnable = {f"{bn}.{name}" for bn in ("bn1", "bn2") for name in LEARNABLE[affine]}
    assert moved == learnable | {"conv1.weight", "conv2.weight", "head.weight", "head.bias"}


def test_merged_and_original_are_one_function_and_two_optimization_problems() -> None:
    results = {}
    for affine in ("merged", "original"):
        model, x = build("plain")
        fbn.convert(model, fbn.Freeze(affine), example_input=x)
        start = model(x).detach().clone()
        train_a_little(model, x)
        results[affine] = (start, model(x).detach())
    assert_close(results["merged"][0], results["original"][0])
    apart = [(one - other).abs().max() for one, other in zip(*results.values(), strict=True)]
    assert apart[1] > 1000 * apart[0]


@pytest.mark.parametrize("net", ["tied", "norm_act", "pre_activation"])
def test_on_a_batch_of_one_a_frozen_network_trains(net: str, affine: Affine) -> None:
    model, x = build(net)
    model = quiet(fbn.convert(model, fbn.Freeze(affine), example_input=x)).train()
    assert_close(model(x[:1]), model(x)[:1])


def test_shared_layers_stay_shared(affine: Affine) -> None:
    model, x = build("tied")
    fbn.convert(model, fbn.Freeze(affine), example_input=x)
    assert model.first.bn is model.second.bn
    assert model.first.bn is not model.between
    fbn.revert(model, example_input=x)
    assert model.first.bn is model.second.bn


def test_a_batch_norm_itself_is_replaced_and_the_replacement_returned(affine: Affine) -> None:
    bn, x = build("root")
    frozen = fbn.convert(bn, fbn.Freeze(affine), example_input=x)
    assert type(frozen) is FrozenBatchNorm2d
    assert fbn.revert(frozen, example_input=x) is bn
    model = with_norm(nn.BatchNorm2d(4))
    assert fbn.convert(model, fbn.Freeze(affine)) is model


def test_norm_act_layers_keep_their_activation_and_drop() -> None:
    model, x = build("norm_act")
    act, drop = model[1].act, model[1].drop
    fbn.convert(model, fbn.Freeze(), example_input=x)
    assert type(model[1]) is FrozenBatchNormAct2d
    assert (model[1].act, model[1].drop) == (act, drop)
    fbn.revert(model)
    assert (model[1].act, model[1].drop) == (act, drop)


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm2d(4, affine=False), None], ids=["affine=False", "bias=False"])
def test_missing_affine_tensors_stay_missing_and_state_dicts_the_same(make: Callable[[], nn.Module] | None) -> None:
    model = settle(with_norm(make()) if make else without_bias())
    x = torch.randn(2, 3, 8, 8)
    expected, keys = model.eval()(x), set(model.state_dict())
    fbn.convert(model, fbn.Freeze(fold="never"), example_input=x)
    assert torch.equal(model.train()(x), expected)
    assert set(model.state_dict()) == keys
    with untouched(model), pytest.raises(UnsupportedLayer, match=r"has no .*bias that affine='shift' could"):
        fbn.convert(model, fbn.Freeze("shift"))
    fbn.revert(model)
    assert set(model.state_dict()) == keys


def test_a_track_running_stats_flag_that_was_cleared_later_does_not_matter() -> None:
    model, x = build("plain")
    expected = model.eval()(x)
    model.bn1.track_running_stats = False  # as Lightning's BaseFinetuning does; the statistics are still there
    fbn.convert(model, fbn.Freeze(fold="never"), example_input=x)
    assert torch.equal(model.train()(x), expected)
    fbn.revert(model)
    assert model.bn1.track_running_stats is False


def test_attributes_of_the_layer_are_kept(affine: Affine) -> None:
    model, x = build("plain")
    model.bn1.weight.requires_grad_(False)
    model.bn1.note = "mine"
    model.bn1.eval()
    handle = model.bn2.register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    calls: list[str] = []
    fbn.convert(model, fbn.Freeze(affine))
    assert (model.bn2.eps, model.bn2.momentum, int(model.bn2.num_batches_tracked)) == (1e-3, 0.01, 7)
    assert (model.bn1.training, model.bn2.training) == (False, True)
    model(x)
    fbn.revert(model)
    model(x)
    assert calls == ["FrozenBatchNorm2d", "BatchNorm2d"]
    handle.remove()
    model(x)
    assert len(calls) == 2
    assert (model.bn1.weight.requires_grad, model.bn1.note, model.bn1.training) == (False, "mine", False)
    assert (model.bn2.eps, model.bn2.momentum) == (1e-3, 0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_convert_prove_and_revert(affine: Affine, dtype: torch.dtype) -> None:
    model, x = build("tied")
    model, x = model.to(dtype).eval(), x.to(dtype)
    expected = model(x)
    fbn.convert(model, fbn.Freeze(affine), example_input=x)
    assert model(x).dtype == dtype
    assert_close(model(x), expected)
    fbn.revert(model, example_input=x)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_converted_network_may_change_its_dtype_and_revert(affine: Affine, dtype: torch.dtype) -> None:
    model, x = build("plain")
    fbn.convert(model, fbn.Freeze(affine), example_input=x).to(dtype)
    x = x.to(dtype)
    expected = model.eval()(x)
    fbn.revert(model, example_input=x)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_close(model(x), expected)


def test_a_network_on_the_meta_device_is_converted_without_a_proof_and_filled_later(affine: Affine) -> None:
    with torch.device("meta"):
        model = Plain()
    fbn.convert(model, fbn.Freeze(affine), example_input=torch.ones(1))
    reference, x = build("plain")
    model.load_state_dict(reference.state_dict(), assign=True)
    assert_close(model.eval()(x), reference.eval()(x))
    fbn.revert(model, example_input=x)
    assert_same_state(model.state_dict(), reference.state_dict())


@pytest.mark.parametrize("way", ["deepcopy", "file"])
def test_a_copy_of_a_converted_network_reverts_by_itself(affine: Affine, way: str) -> None:
    model, x = build("tied")
    fbn.convert(model, fbn.Freeze(affine), example_input=x)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    fbn.revert(other, example_input=x)
    assert other.first.bn is other.second.bn
    assert_same_state(other.state_dict(), build("tied")[0].state_dict())
    assert isinstance(model.between, FrozenBatchNorm)


def test_a_part_of_a_model_can_be_converted_and_reverted() -> None:
    model = settle(nn.Sequential(Plain(), Plain()))
    fbn.convert(model, fbn.Freeze())
    fbn.revert(model[0])
    assert [type(layer) for layer in norm_layers(model)] == [nn.BatchNorm2d] * 2 + [FrozenBatchNorm2d] * 2


def test_compiled_after_conversion_a_network_has_no_graph_break(affine: Affine) -> None:
    model, x = build("norm_act")
    model = quiet(fbn.convert(model, fbn.Freeze(affine), example_input=x)).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for one, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


def test_channels_last_stays_channels_last(affine: Affine) -> None:
    model, x = build("conv_twice")
    fbn.convert(model, fbn.Freeze(affine), example_input=x)
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    assert model(x).is_contiguous(memory_format=torch.channels_last)


# Live statistics


def test_freeze_affine_keeps_statistics_live_and_gamma_and_beta_constant() -> None:
    model, x = build("plain")
    bn1 = model.bn1
    fbn.convert(model, fbn.FreezeAffine(), example_input=x)
    assert model.bn1 is bn1
    before = copy.deepcopy(model.state_dict())
    train_a_little(model.train(), x)
    moved = {n for n, v in model.state_dict().items() if n.startswith("bn") and not torch.equal(v, before[n])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert moved == {f"{bn}.{name}" for bn in ("bn1", "bn2") for name in statistics}
    fbn.revert(model)
    assert all(p.requires_grad for p in model.parameters())


def test_normalize_only_needs_to_be_asked_for_and_is_undone() -> None:
    model, _ = build("plain")
    gamma = model.bn1.weight.clone()
    with untouched(model), pytest.raises(UnsupportedLayer, match=r"NormalizeOnly\(change_function=True\) does it"):
        fbn.convert(model, fbn.NormalizeOnly())
    fbn.convert(model, CHANGE)
    assert torch.equal(model.bn1.weight, torch.ones(6))
    assert not model.bn1.weight.requires_grad
    fbn.revert(model)
    assert torch.equal(model.bn1.weight, gamma)
    assert model.bn1.weight.requires_grad


def test_keep_keeps() -> None:
    model, x = build("plain")
    with untouched(model):
        fbn.convert(model, fbn.Keep(), example_input=x)


# One conversion after another


CHAINS: list[list[Policy]] = [
    [fbn.Freeze("none"), MERGED, fbn.Freeze("shift")],
    [MERGED, fbn.Freeze("original"), MERGED],
    [fbn.Freeze("shift"), fbn.FreezeAffine(), MERGED, fbn.Freeze("none")],
    [CHANGE, fbn.Freeze("none")],
    [CHANGE, MERGED],
    [CHANGE, fbn.FreezeAffine()],
    [fbn.FreezeAffine(), CHANGE, fbn.Freeze("shift"), CHANGE],
    [MERGED, CHANGE],
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: " then ".join(map(str, chain)))
@pytest.mark.parametrize("net", ["tied", "norm_act", "root"])
def test_a_chain_of_conversions_reverts_bit_for_bit(net: str, chain: list[Policy]) -> None:
    model, x = build(net)
    flags = [p.requires_grad for p in model.parameters()]
    for policy in chain:
        model = fbn.convert(model, policy, example_input=x)
    model = fbn.revert(model, example_input=x)
    assert_same_state(model.state_dict(), build(net)[0].state_dict())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(is_held(module) for module in model.modules())


def test_a_chain_with_training_in_between_keeps_the_function() -> None:
    model, x = build("plain")
    for affine in ("none", "merged", "shift", "original", "merged"):
        fbn.convert(model, fbn.Freeze(affine), example_input=x)
        train_a_little(model, x)
    expected = model(x).detach()
    assert_close(fbn.revert(model, example_input=x).eval()(x), expected)


def test_freezing_what_was_held_constant_trains_what_the_new_policy_says() -> None:
    for first in (fbn.FreezeAffine(), CHANGE):
        model, x = build("plain")
        model.bn2.bias.requires_grad_(False)
        fbn.convert(model, first)
        fbn.convert(model, MERGED, example_input=x)
        assert (model.bn1.weight.requires_grad, model.bn1.bias.requires_grad) == (True, True)
        assert (model.bn2.weight.requires_grad, model.bn2.bias.requires_grad) == (True, False)  # the user's own choice


def test_what_was_trained_after_a_reset_is_not_thrown_away_by_revert() -> None:
    model, x = build("plain")
    fbn.convert(fbn.convert(model, CHANGE), MERGED, example_input=x)
    train_a_little(model, x)
    expected = model(x).detach()
    assert_close(fbn.revert(model, example_input=x).eval()(x), expected)


@pytest.mark.parametrize("policy", [*map(fbn.Freeze, AFFINE_KINDS), fbn.FreezeAffine(), CHANGE], ids=str)
def test_the_same_policy_twice_is_once(policy: Policy) -> None:
    model, x = build("tied")
    fbn.convert(model, policy, example_input=x)
    planned = fbn.plan(model, policy)
    with untouched(model):
        fbn.convert(model, policy, example_input=x)
    with untouched(model):
        fbn.convert(model, planned, example_input=x)


def test_rules_with_types_apply_a_second_time() -> None:
    model, x = build("plain")
    rules = fbn.Rules([Rule(fbn.Freeze("shift"), type="BatchNorm2d")])
    fbn.convert(model, rules, example_input=x)
    with untouched(model):
        fbn.convert(model, rules, example_input=x)


def test_a_plan_from_a_checkpoint_does_what_the_policy_did() -> None:
    rules = fbn.Rules([("between", fbn.FreezeAffine()), ("*", MERGED)])
    first, x = build("tied")
    planned = fbn.plan(first, rules)
    fbn.convert(first, rules, example_input=x)
    second, _ = build("tied")
    fbn.convert(second, Plan.from_dict(planned.to_dict()), example_input=x)
    assert [type(m) for m in second.modules()] == [type(m) for m in first.modules()]
    assert_same_state(second.state_dict(), first.state_dict())
    assert [p.requires_grad for p in second.parameters()] == [p.requires_grad for p in first.parameters()]


# All or nothing


class LastIsRefused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Tied()
        self.last = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


@pytest.mark.parametrize("before", [None, fbn.Freeze("shift"), MERGED, fbn.FreezeAffine()], ids=str)
def test_a_refused_layer_at_the_end_leaves_everything_as_it_was(before: Policy | None, affine: Affine) -> None:
    model = settle(LastIsRefused())
    if before is not None:
        fbn.convert(model, fbn.Rules([("first.*", before), ("*", fbn.Keep())]))
    with untouched(model), pytest.raises(UnsupportedLayer, match="1 of 3 BatchNorm layers cannot take it") as raised:
        fbn.convert(model, fbn.Freeze(affine))
    assert "last: has no running statistics" in str(raised.value)
    rest = f"Freeze(affine={affine!r})" if affine != "none" else "Freeze()"
    assert f'by rules, as Rules([("last", Keep()), ("*", {rest})]).' in str(raised.value)


def test_every_refused_layer_is_named_at_once() -> None:
    model = nn.ModuleDict({case.replace(" ", "_"): make() for case, (make, _) in UNFREEZABLE.items()})
    before = list(model.modules())
    with pytest.raises(UnsupportedLayer, match="3 of 3") as raised:
        fbn.convert(model, fbn.Freeze())
    assert list(model.modules()) == before
    for case, (_, reason) in UNFREEZABLE.items():
        assert case.replace(" ", "_") in str(raised.value)
        assert reason in str(raised.value)


def test_the_remedy_in_the_error_works() -> None:
    model = settle(LastIsRefused())
    fbn.convert(model, fbn.Rules([("last", fbn.Keep()), ("*", fbn.Freeze())]))
    assert isinstance(model.first.between, FrozenBatchNorm)
    assert isinstance(model.last, nn.BatchNorm2d)


@pytest.mark.parametrize("before", [None, fbn.Freeze("shift"), MERGED, fbn.FreezeAffine()], ids=str)
def test_a_wrong_example_input_leaves_everything_as_it_was(before: Policy | None, affine: Affine) -> None:
    model, x = build("tied")
    if before is not None:
        fbn.convert(model, before, example_input=x)
    wrong = torch.zeros(1, 3, 6, 6)
    for policy in (fbn.Freeze(affine), fbn.plan(model, fbn.Freeze(affine))):
        if before == fbn.Freeze(affine) and isinstance(policy, Plan):
            continue  # nothing to do, nothing to prove
        with untouched(model), pytest.raises(FinetuneBNError, match=r"example_input: got \[\(1, 3, 6, 6\)\]"):
            fbn.convert(model, policy, example_input=wrong)


@pytest.mark.parametrize("before", [None, fbn.Freeze("shift"), MERGED], ids=str)
def test_a_mismatch_names_the_first_layer_that_breaks_in_the_order_of_calls_and_is_undone(
    before: Policy | None,
) -> None:
    model = settle(AsksForItsType())
    x = torch.randn(2, 3, 4, 4)
    if before is not None:
        fbn.convert(model, fbn.Rules([("bn1", before), ("*", fbn.Keep())]), example_input=x)
    with untouched(model), pytest.raises(ConversionMismatch, match="first at layer 'bn2'") as raised:
        fbn.convert(model, fbn.Freeze(), example_input=x)
    assert "Nothing was changed" in str(raised.value)
    # The remedy of the message:
    fbn.convert(model, fbn.Rules([("bn2", fbn.Keep()), ("*", fbn.Freeze())]), example_input=x)
    assert isinstance(model.bn3, FrozenBatchNorm)


def test_a_mismatch_behind_the_last_new_layer_is_said_to_lie_there() -> None:
    class AsksAtTheEnd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) * (1 if isinstance(self.bn, nn.BatchNorm2d) else 2)

    model = settle(AsksAtTheEnd())
    with untouched(model), pytest.raises(ConversionMismatch, match="the model's own code behind the last new layer"):
        fbn.convert(model, fbn.Freeze(), example_input=torch.zeros(2, 3, 4, 4) + 1)


def test_a_model_that_raises_with_the_new_layers_is_a_mismatch_and_not_the_users_input() -> None:
    class Asserts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(self.bn, nn.BatchNorm2d):
                raise TypeError("I want a BatchNorm2d")
            return self.bn(x)

    model = settle(Asserts())
    with untouched(model), pytest.raises(ConversionMismatch, match=r"with the new layers it raises TypeError.*I wan"):
        fbn.convert(model, fbn.Freeze(), example_input=torch.zeros(2, 3, 4, 4))


def test_a_layer_whose_numbers_do_not_survive_merging_is_named_without_any_example_input() -> None:
    model, _ = build("plain")
    model.bn2.running_mean.fill_(1e6)
    model.bn2.running_var.fill_(1e-6)
    with (
        untouched(model),
        pytest.raises(ConversionMismatch, match=r"layer bn2 \(BatchNorm2d\): outputs before and after"),
    ):
        fbn.convert(model, MERGED)
    fbn.convert(model, fbn.Rules([("bn2", fbn.Freeze("original")), ("*", MERGED)]))


def test_without_verify_no_proof_is_asked_for() -> None:
    model = settle(AsksForItsType())
    before = copy.deepcopy(model.state_dict())
    fbn.convert(model, fbn.Freeze(), example_input=torch.zeros(2, 3, 4, 4), verify=False)
    assert isinstance(model.bn2, FrozenBatchNorm)
    fbn.revert(model, example_input=torch.zeros(2, 3, 4, 4), verify=False)
    assert_same_state(model.state_dict(), before)


def test_a_revert_that_would_change_the_outputs_is_undone() -> None:
    model, x = settle(AsksForItsType()), torch.randn(2, 3, 4, 4)
    fbn.convert(model, MERGED, verify=False)
    with untouched(model), pytest.raises(ConversionMismatch, match="'bn2'"):
        fbn.revert(model, example_input=x)


def test_models_of_timm_are_proven_without_an_example_input(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = build("plain")
    model.pretrained_cfg = {"input_size": (3, 16, 16)}
    with caplog.at_level(logging.INFO, logger="finetune_bn"):
        fbn.convert(model, fbn.Freeze())
        assert "no proof" not in caplog.text
        model.pretrained_cfg = {"input_size": (1, 16, 16)}
        fbn.revert(model)
    assert "no proof on the whole network, layer by layer only" in caplog.text
    assert "the input size in its pretrained_cfg, does not fit" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="finetune_bn"):
        fbn.convert(build("plain")[0], fbn.Freeze())
    assert "pass example_input for one" in caplog.text


def test_a_model_that_changes_its_input_in_place_is_proven_all_the_same() -> None:
    class Normalizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x.sub_(0.5).mul_(4))

    model, x = settle(Normalizes()), torch.rand(2, 3, 4, 4)
    before = x.clone()
    fbn.convert(model, fbn.Freeze(), example_input=x)
    assert torch.equal(x, before)


# Bad input


@pytest.mark.parametrize("policy", ["freeze", None, fbn.Freeze, {"policy": "Freeze"}, Policy()])
def test_an_unknown_policy_is_one_clear_error(policy: Any) -> None:
    model, _ = build("plain")
    with untouched(model), pytest.raises(FinetuneBNError, match=r"policy: got .*; allowed: Keep\(\.\.\.\), Freeze"):
        fbn.convert(model, policy)


@pytest.mark.parametrize("model", [None, "resnet18", [nn.BatchNorm2d(3)]])
def test_what_is_no_model_is_one_clear_error(model: Any) -> None:
    for call in (lambda: fbn.convert(model, fbn.Freeze()), lambda: fbn.revert(model)):
        with pytest.raises(FinetuneBNError, match=r"model: got .*; allowed: a torch\.nn\.Module"):
            call()


def test_a_model_without_batch_norm_is_one_clear_error() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with untouched(model), pytest.raises(NoBatchNormMatched, match=r"a model with BatchNorm layers.*'LayerNorm': 1"):
        fbn.convert(model, fbn.Freeze())


def test_a_pattern_that_matches_nothing_is_one_clear_error() -> None:
    model, _ = build("plain")
    with untouched(model), pytest.raises(NoBatchNormMatched, match=r"rule: got \"name='bn9'\""):
        fbn.convert(model, fbn.Rules([("bn9", fbn.Freeze()), ("*", fbn.Keep())]))


@pytest.mark.parametrize("bad", [float("nan"), -1.0, float("inf")])
def test_bad_statistics_in_a_layer_are_one_clear_error(bad: float) -> None:
    model, _ = build("plain")
    model.bn2.running_var[3] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedLayer, match="bn2: its running_var has 1 values that are NaN, infinite or negative"):
        fbn.convert(model, fbn.Freeze())
    assert isinstance(model.bn1, nn.BatchNorm2d)
    torch.testing.assert_close(model.state_dict(), before, equal_nan=True, rtol=0, atol=0)


def test_a_plan_of_another_model_is_one_clear_error() -> None:
    planned = fbn.plan(settle(Plain()), fbn.Freeze())
    other = settle(Tied())
    with (
        untouched(other),
        pytest.raises(NoBatchNormMatched, match=r"plan: got 'bn1: BatchNorm2d with 6 channels'; .*Tied"),
    ):
        fbn.convert(other, planned)
    wider = settle(Plain())
    wider.bn2 = nn.BatchNorm2d(9)
    with untouched(wider), pytest.raises(NoBatchNormMatched, match="It was made for another model"):
        fbn.convert(wider, planned)
    untied = settle(Tied())
    untied.second.bn = nn.BatchNorm2d(4)
    with untouched(untied), pytest.raises(NoBatchNormMatched, match=r"first\.bn = second\.bn"):
        fbn.convert(untied, fbn.plan(other, fbn.Freeze()))


def test_a_plan_with_a_refused_row_is_refused() -> None:
    model = settle(LastIsRefused())
    with untouched(model), pytest.raises(UnsupportedLayer, match="1 of 3"):
        fbn.convert(model, fbn.plan(model, fbn.Freeze()))


def test_reverting_what_was_not_converted_is_one_clear_error() -> None:
    model, _ = build("plain")
    with untouched(model), pytest.raises(NoBatchNormMatched, match=r"layers that `convert` changed.*Nothing to re"):
        fbn.revert(model)


def test_a_model_that_is_wrapped_already_is_refused_by_name() -> None:
    wrapped = torch.compile(Plain(), backend="eager")
    for call in (lambda: fbn.convert(wrapped, fbn.Freeze()), lambda: fbn.revert(wrapped)):
        with pytest.raises(FinetuneBNError, match="got 'OptimizedModule'; allowed: the module before it is wrapped"):
            call()


# Memory


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("resnet50", num_classes=10)


def kept(model: nn.Module, autocast: bool) -> int:
    """Return the bytes of an image: the second one's, so that what a batch costs once (weights cast) is left out."""

    def run(images: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model.train()(torch.ones(images, 3, 224, 224))

    return saved_bytes(model, lambda: run(2)) - saved_bytes(model, lambda: run(1))


@pytest.fixture(scope="module")
def live_bytes(resnet50: nn.Module) -> dict[bool, int]:
    return {autocast: kept(resnet50, autocast) for autocast in (False, True)}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("affine", ["none", "shift"])
def test_resnet50_keeps_at_most_half_the_bytes_of_live_batch_norm_for_backward(
    resnet50: nn.Module, live_bytes: dict[bool, int], affine: Affine, autocast: bool
) -> None:
    model = fbn.convert(resnet50, fbn.Freeze(affine), verify=False)
    try:
        assert kept(model, autocast) <= 0.50 * live_bytes[autocast]
    finally:
        fbn.revert(model, verify=False)


def test_torchvisions_frozen_layer_keeps_more_than_live_batch_norm_under_autocast(
    resnet50: nn.Module, live_bytes: dict[bool, int]
) -> None:
    """The peer that the figure above stands beside: it promotes its output to float32."""
    ops = pytest.importorskip("torchvision.ops")
    model = copy.deepcopy(resnet50)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = ops.FrozenBatchNorm2d(child.num_features, child.eps)
                frozen.load_state_dict(child.state_dict())
                setattr(parent, name, frozen)
    if ops.FrozenBatchNorm2d(3)(torch.ones(1, 3, 1, 1, dtype=torch.bfloat16)).dtype == torch.bfloat16:
        pytest.skip("this torchvision keeps the dtype")
    assert kept(model, autocast=True) > 1.3 * live_bytes[True]


# ---- what a review found


def test_keep_turns_a_converted_layer_back() -> None:
    model, x = build("plain")
    before = copy.deepcopy(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    for policy in (fbn.Freeze("merged"), fbn.FreezeAffine()):
        model = fbn.convert(fbn.convert(model, policy, example_input=x), fbn.Keep(), example_input=x)
        assert [type(m) for m in model.modules()] == kinds
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())


def test_a_layer_that_is_also_held_outside_of_the_modules_is_noticed_and_nothing_changes() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.listed = [self.bn]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.listed[0](x)

    model, x = Hidden().train(), torch.randn(2, 3, 4, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConversionMismatch, match=r"layers \['bn'\] ran before, and do not run"):
        fbn.convert(model, fbn.Freeze(), example_input=x)
    assert isinstance(model.bn, nn.BatchNorm2d)
    assert model.bn.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_network_that_amplifies_rounding_is_proven_in_float64(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one_bit(*values: Any) -> tuple[torch.Tensor, ...]:
        weight, *rest = canonicalize(*values)
        return (torch.nextafter(weight, weight + 1), *rest)

    monkeypatch.setattr(frozen_layers, "canonicalize", off_by_one_bit)

    class Chaotic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(512)
            nn.init.uniform_(self.bn.weight, 0.5, 2)
            nn.init.uniform_(self.bn.running_mean, -1, 1)
            nn.init.uniform_(self.bn.running_var, 0.5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(1e5 * self.bn(x))

    model, x = Chaotic(), torch.randn(8, 512)
    fbn.convert(model, fbn.Freeze("merged"), example_input=x)
    assert "proven in float64" in caplog.text
    assert model.bn.affine_kind == "merged"
    # What is no rounding does not pass for it.
    monkeypatch.setattr(frozen_layers, "canonicalize", lambda w, *rest: (w * 1.001, *canonicalize(w, *rest)[1:]))
    with pytest.raises(ConversionMismatch):
        fbn.convert(Chaotic(), fbn.Freeze("merged"), example_input=x)


def test_a_bfloat16_network_that_returns_float32_is_judged_as_bfloat16() -> None:
    class Returns32(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, _ = build("plain")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).float()

    _, x = build("plain")
    model = Returns32().bfloat16()
    fbn.convert(model, fbn.Freeze("merged"), example_input=x.bfloat16())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_converting_leaves_every_random_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    model, x = build("plain")
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    state = torch.random.get_rng_state()
    fbn.convert(model, fbn.Freeze(), example_input=x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert seeded == []


def test_a_part_wrapped_for_several_processes_is_refused_by_name() -> None:
    model, _ = build("plain")
    whole = nn.Sequential(nn.DataParallel(model))
    with pytest.raises(FinetuneBNError, match=r"model: got 'DataParallel as 0'"):
        fbn.convert(whole, fbn.Freeze())


@pytest.mark.parametrize("policy", [fbn.Freeze(), fbn.Freeze("merged"), fbn.ToGroupNorm(groups=2)], ids=str)
def test_the_network_runs_three_times_in_eval_mode_and_once_in_training(policy: fbn.Policy) -> None:
    """For the plan, before and after; what is proven once is not proven again."""
    model, x = build("plain")
    modes: list[bool] = []
    model.eval().register_forward_pre_hook(lambda module, args: modes.append(module.training))
    fbn.convert(model, policy, example_input=x)
    assert modes == [False, False, False, True]
