"""Conversion to layers that track statistics in a way of their own, and to frozen ones with noise."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

import finetune_bn as fbn
from finetune_bn.conversion.plan import Plan
from finetune_bn.conversion.policies import Policy, Rule
from finetune_bn.errors import ConversionMismatch, UnsupportedLayer
from finetune_bn.functional.frozen import TOLERANCE
from finetune_bn.layers import (
    BatchRenorm2d,
    EvalBatchNorm,
    FrozenBatchNorm2d,
    GhostBatchNorm2d,
    GhostBatchNormAct2d,
    NoisyFrozenBatchNorm,
    TrackingBatchNorm,
)
from finetune_bn.layers.hold_affine import is_held
from tests.models import NETS, UNFREEZABLE, AsksForItsType, Tied, build, settle, with_norm
from tests.tools import assert_same_state, untouched, without_extra_state

INF = math.inf
TRACKING: list[Policy] = [
    fbn.Ghost(2),
    fbn.Renorm(1.5, 0.5),
    fbn.Renorm(INF, INF, bn_steps=1, ramp_steps=2, momentum=0.01),
    fbn.Stochastic(0.5),
    fbn.EvalNorm(0.25),
]
POLICIES: list[Policy] = [*TRACKING, fbn.Freeze(noise=8), fbn.Freeze("original", noise=8)]


@pytest.fixture(params=POLICIES, ids=lambda policy: policy.describe())
def policy(request: pytest.FixtureRequest) -> Policy:
    return request.param


def converted_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (TrackingBatchNorm, NoisyFrozenBatchNorm))]


def train_a_little(model: nn.Module, x: Tensor) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(3):
        y = model.train()(x)
        if trained:
            optimizer = torch.optim.SGD(trained, lr=0.03)
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


@pytest.mark.parametrize("net", NETS)
def test_every_layer_is_converted_and_the_network_evaluates_as_before(net: str, policy: Policy) -> None:
    model, x = build(net)
    before, expected = copy.deepcopy(model.state_dict()), model.eval()(x)
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    model = fbn.convert(model, policy, example_input=x)
    assert len(converted_layers(model)) == len(layers)
    assert_same_state(without_extra_state(model.state_dict()), before)
    assert torch.equal(model.eval()(x), expected) != isinstance(policy, fbn.EvalNorm)
    for layer in converted_layers(model):
        if isinstance(layer, EvalBatchNorm):
            layer.alpha = 0.0  # in that alone it differs
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("net", NETS)
def test_a_trained_network_reverts_to_the_batch_norms_it_was_with_the_values_of_today(net: str, policy: Policy) -> None:
    model, x = build(net)
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    parameters = list(model.parameters())
    model = fbn.convert(model, policy, example_input=x)
    train_a_little(model, x)
    state = copy.deepcopy(model.state_dict())
    expected = model.eval()(x)
    model = fbn.revert(model, example_input=x)
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    now = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert all(one is other for one, other in zip(now, layers, strict=True))
    assert_same_state(model.state_dict(), without_extra_state(state))
    if not isinstance(policy, fbn.EvalNorm):
        assert_close(model.eval()(x), expected)


@pytest.mark.parametrize("net", ["tied", "norm_act", "head1d"])
def test_checkpoints_load_strictly_both_ways(net: str, policy: Policy) -> None:
    vanilla, x = build(net)
    model = fbn.convert(settle(build(net)[0], seed=3), policy, example_input=x)
    model.load_state_dict(vanilla.state_dict(), strict=True)
    train_a_little(model, x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    if isinstance(policy, fbn.EvalNorm):  # which computes something else in evaluation than a BatchNorm would
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*_extra_state"):
            vanilla.load_state_dict(state, strict=True)
        return
    vanilla.load_state_dict(state, strict=True)
    assert_same_state(vanilla.state_dict(), state)
    assert torch.equal(vanilla.eval()(x), model.eval()(x))


@pytest.mark.parametrize("interrupted", [1, 3])
def test_a_resumed_run_goes_on_as_if_it_had_not_been_interrupted(interrupted: int, policy: Policy) -> None:
    """Its network is built anew, from other weights, converted by the plan of the checkpoint, and loaded."""

    def steps(model: nn.Module, numbers: range) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.03)
        for number in numbers:
            torch.manual_seed(number)
            model.train()(torch.randn(6, 3, 9, 9)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, _ = build("plain")
    fbn.convert(whole, policy)
    steps(whole, range(6))
    first, _ = build("plain")
    planned = fbn.plan(first, policy)
    fbn.convert(first, policy)
    steps(first, range(interrupted))
    second = settle(build("plain")[0], seed=5)
    second.bn1.num_batches_tracked.zero_()
    fbn.convert(second, Plan.from_dict(planned.to_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()), strict=True)
    steps(second, range(interrupted, 6))
    assert_same_state(second.state_dict(), whole.state_dict())


def test_names_hooks_flags_and_sharing_stay(policy: Policy) -> None:
    model, x = build("tied")
    model.between.weight.requires_grad_(False)
    calls: list[str] = []
    model.between.register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    model.between.eval()
    model = fbn.convert(model, policy, example_input=x)
    assert model.first.bn is model.second.bn
    assert model.first.bn is not model.between
    assert not model.between.training
    calls.clear()
    model(x)
    fbn.revert(model, example_input=x)
    model(x)
    assert calls[0] == type(converted_layers(fbn.convert(model, policy))[0]).__name__
    assert calls[-1] != calls[0]
    assert not model.between.weight.requires_grad


def test_the_same_policy_twice_is_once(policy: Policy) -> None:
    model, x = build("tied")
    fbn.convert(model, policy, example_input=x)
    planned = fbn.plan(model, policy)
    for again in (policy, planned, Plan.from_dict(planned.to_dict())):
        with untouched(model):
            fbn.convert(model, again, example_input=x)


def test_other_settings_are_another_policy() -> None:
    model, x = build("plain")
    for first, second, name in (
        (fbn.Ghost(2), fbn.Ghost(3), "groups"),
        (fbn.Renorm(2.0), fbn.Renorm(3.0), "r_max"),
        (fbn.Renorm(), fbn.Renorm(momentum=0.5), "momentum"),
        (fbn.Stochastic(0.5), fbn.Stochastic(0.7), "p"),
        (fbn.EvalNorm(0.2), fbn.EvalNorm(0.3), "alpha"),
        (fbn.Freeze(noise=8), fbn.Freeze(noise=9), "noise"),
    ):
        fbn.convert(model, first, example_input=x)
        fbn.convert(model, second, example_input=x)
        assert getattr(model.bn1, name) == getattr(second, name)
    assert type(fbn.convert(model, fbn.Freeze(), example_input=x).bn1) is FrozenBatchNorm2d


@pytest.mark.parametrize("before", [fbn.Freeze("merged"), fbn.FreezeAffine(), fbn.Ghost(3), fbn.EvalNorm(0.1)], ids=str)
@pytest.mark.parametrize("after", [fbn.Keep(), fbn.Freeze("merged"), fbn.FreezeAffine()], ids=str)
@pytest.mark.parametrize("net", ["tied", "norm_act", "root"])
def test_a_chain_of_conversions_reverts_bit_for_bit(net: str, before: Policy, after: Policy, policy: Policy) -> None:
    model, x = build(net)
    flags = [p.requires_grad for p in model.parameters()]
    for step in (before, policy, after, policy):
        model = fbn.convert(model, step, example_input=x)
    assert len(converted_layers(model)) == len([m for m in build(net)[0].modules() if isinstance(m, _BatchNorm)])
    model = fbn.revert(model, example_input=x)
    assert_same_state(model.state_dict(), build(net)[0].state_dict())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(is_held(module) for module in model.modules())


def test_what_was_held_constant_is_trained_again(policy: Policy) -> None:
    model, x = build("plain")
    model.bn2.bias.requires_grad_(False)
    fbn.convert(model, fbn.FreezeAffine())
    fbn.convert(model, policy, example_input=x)
    trained = isinstance(model.bn1, TrackingBatchNorm) or policy == fbn.Freeze("original", noise=8)
    assert (model.bn1.weight.requires_grad, model.bn1.bias.requires_grad) == (trained, trained)
    assert not model.bn2.bias.requires_grad  # the user's own choice


def test_rules_mix_policies_and_find_the_layers_again() -> None:
    model, x = build("tied")
    rules = fbn.Rules([("*.bn", fbn.Ghost(2)), Rule(fbn.Renorm(), type="BatchNorm2d")])
    fbn.convert(model, rules, example_input=x)
    assert (type(model.first.bn), type(model.between)) == (GhostBatchNorm2d, BatchRenorm2d)
    with untouched(model):
        fbn.convert(model, rules, example_input=x)
    fbn.convert(model, fbn.Rules([Rule(fbn.Keep(), type="GhostBatchNorm2d")]), example_input=x)
    assert (type(model.first.bn), type(model.between)) == (nn.BatchNorm2d, BatchRenorm2d)


def test_a_synchronized_layer_is_converted_and_the_plan_says_what_that_costs() -> None:
    model, x = build("sync")
    for policy in TRACKING:
        (row,) = fbn.plan(model, policy).rows
        assert row.reason == "each process will normalize by images of its own: they are no longer synchronized"
    sync = model[1]
    fbn.convert(model, fbn.Ghost(2), example_input=x)
    model.train()(x)  # the SyncBatchNorm itself wants a GPU here
    assert fbn.revert(model)[1] is sync


def test_timms_layers_keep_their_activation() -> None:
    model, x = build("norm_act")
    act, drop = model[1].act, model[1].drop
    fbn.convert(model, fbn.Ghost(2), example_input=x)
    assert type(model[1]) is GhostBatchNormAct2d
    assert (model[1].act, model[1].drop) == (act, drop)
    fbn.revert(model)
    assert (model[1].act, model[1].drop) == (act, drop)


# Eval norm changes the function, and nothing else may


def test_eval_norm_takes_effect_after_the_proof_and_revert_takes_it_back() -> None:
    model, x = build("plain")
    expected = model.eval()(x)
    fbn.convert(model, fbn.EvalNorm(0.25), example_input=x)
    assert (model.bn1.alpha, model.bn2.alpha) == (0.25, 0.25)
    assert not torch.allclose(model.eval()(x), expected)
    fbn.revert(model, example_input=x)
    assert torch.equal(model.eval()(x), expected)


@pytest.mark.parametrize("target", [fbn.Freeze(), fbn.Keep(), fbn.EvalNorm(0.5), fbn.Ghost(2)], ids=str)
def test_a_conversion_from_eval_norm_that_fails_leaves_it_as_it_was(target: Policy) -> None:
    model, x = settle(AsksForItsType()), torch.randn(2, 3, 4, 4)
    with untouched(model), pytest.raises(ConversionMismatch, match="'bn2'"):
        fbn.convert(model, fbn.EvalNorm(0.25), example_input=x)
    fbn.convert(model, fbn.EvalNorm(0.25), verify=False)
    assert model.bn2.alpha == 0.25
    if isinstance(target, fbn.Keep):
        with untouched(model), pytest.raises(ConversionMismatch, match="'bn2'"):
            fbn.revert(model, example_input=x)
    else:
        fbn.convert(model, target, example_input=x)
        return
    assert (model.bn1.alpha, model.bn2.alpha, model.bn3.alpha) == (0.25, 0.25, 0.25)


# What is refused


@pytest.mark.parametrize("case", UNFREEZABLE)
def test_what_cannot_be_converted_is_refused_with_the_reason(case: str, policy: Policy) -> None:
    make, reason = UNFREEZABLE[case]
    model = nn.Sequential(nn.BatchNorm2d(4), make())
    with untouched(model[0]), pytest.raises(UnsupportedLayer, match="1 of 2") as raised:
        fbn.convert(model, policy)
    assert reason in str(raised.value)


def test_statistics_that_went_bad_since_are_noticed() -> None:
    for first, second in ((fbn.Ghost(2), fbn.Renorm()), (fbn.Stochastic(), fbn.Freeze())):
        model, x = build("plain")
        fbn.convert(model, first, example_input=x)
        model.bn2.running_var[3] = torch.nan
        with pytest.raises(UnsupportedLayer, match="bn2: its running_var has 1 values"):
            fbn.convert(model, second, example_input=x)
        assert type(model.bn1) is not nn.BatchNorm2d


def test_a_layer_with_tensors_of_its_own_is_refused() -> None:
    layer = nn.BatchNorm2d(4)
    layer.register_buffer("seen", torch.zeros(1))
    with pytest.raises(UnsupportedLayer, match=r"holds seen besides BatchNorm's five .* which a layer for Ghost would"):
        fbn.convert(with_norm(layer), fbn.Ghost(2))


def test_a_layer_that_was_parametrized_since_is_refused() -> None:
    model, x = build("plain")
    fbn.convert(model, fbn.Ghost(2), example_input=x)
    parametrize.register_parametrization(model.bn1, "weight", nn.Softplus())
    with pytest.raises(UnsupportedLayer, match=r"1 of 2 .*\n  bn1: has parametrized tensors"):
        fbn.convert(model, fbn.Freeze())


class OwnGhost(GhostBatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_a_subclass_of_our_layers_with_a_forward_of_its_own_is_refused() -> None:
    with pytest.raises(UnsupportedLayer, match="is a subclass with a forward of its own"):
        fbn.convert(with_norm(OwnGhost(4, 2)), fbn.Freeze())
    made_by_hand = with_norm(GhostBatchNorm2d(4, 2))
    assert type(fbn.convert(made_by_hand, fbn.Freeze())[1]) is FrozenBatchNorm2d


def test_new_statistics_are_remarked_on_where_training_goes_by_them() -> None:
    remarked = {p.describe(): "those of a new layer" in fbn.plan(Tied(), p).rows[0].reason for p in POLICIES}
    assert [name.split(",")[0] for name, said in remarked.items() if not said] == ["ghost batches x[i::2]", "eval norm"]


# Training


def test_the_network_compiles_without_a_graph_break(policy: Policy) -> None:
    torch._dynamo.reset()
    model, x = build("plain")
    fbn.convert(model, policy, example_input=x).train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run, module in ((compiled, model), (twin, twin)):
        torch.manual_seed(0)
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [p for p in module.parameters() if p.requires_grad])])
    for one, other in zip(*results, strict=True):
        assert_close(one, other)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_convert_prove_train_and_revert(dtype: torch.dtype, policy: Policy) -> None:
    model, x = build("tied")
    model, x = model.to(dtype), x.to(dtype)
    before = copy.deepcopy(model.state_dict())
    fbn.convert(model, policy, example_input=x)
    y = model.train()(x)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    fbn.revert(model, example_input=x)
    assert {t.dtype for t in model.state_dict().values()} == {t.dtype for t in before.values()}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_stays(memory_format: torch.memory_format, policy: Policy) -> None:
    model, x = build("conv_twice")
    fbn.convert(model, policy, example_input=x)
    model, x = model.to(memory_format=memory_format).train(), x.to(memory_format=memory_format)
    assert model(x).is_contiguous(memory_format=memory_format)
    assert model(torch.cat([x, x[:1]])).is_contiguous(memory_format=memory_format)


def test_autocast_keeps_the_low_precision(policy: Policy) -> None:
    model, x = build("conv_twice")
    fbn.convert(model, policy, example_input=x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.train()(x).dtype == torch.bfloat16
    assert model.bn1.running_var.dtype == torch.float32


def leak(policy: Policy, peers: list[int]) -> float:
    """Return how far image 0 of a 4 x 3 batch moves in training when these other images change."""
    model, _ = build("plain")
    model = fbn.convert(model, policy).train()
    x = torch.randn(12, 3, 9, 9, generator=torch.Generator().manual_seed(4))
    changed = x.clone()
    changed[peers] += torch.randn(len(peers), 3, 9, 9, generator=torch.Generator().manual_seed(5))
    outputs = []
    for batch in (x, changed):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(copy.deepcopy(model)(batch)[0])
    return float((outputs[0] - outputs[1]).abs().max())


def test_what_leaks_between_the_images_of_a_batch_and_what_does_not() -> None:
    positives, others = [1, 2], [3, 6, 9]
    assert leak(fbn.Keep(), positives) > 1e-2
    assert leak(fbn.Ghost(3), positives) == 0
    assert leak(fbn.Ghost(3), others) > 1e-2
    assert leak(fbn.Freeze(noise=8), positives + others) == 0
    assert leak(fbn.Renorm(INF, INF), positives + others) == 0
    assert leak(fbn.Renorm(1.0, 0.0), positives) > 1e-2
    assert leak(fbn.Stochastic(0.5), positives) > 1e-2
