"""Where the peers break: each test names one and its fault, shows that ours has not got it, then that the peer has.

A newer version of a peer that has mended its fault makes its test skip, after ours has passed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import finetune_bn as fbn
from finetune_bn.errors import FinetuneBNError, UnsupportedLayer
from finetune_bn.layers import FrozenBatchNorm, FrozenBatchNorm2d
from finetune_bn.layers.frozen import AFFINE_KINDS, LEARNABLE, Affine
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.metric_learning.pk_sampler import PKBatchSampler
from tests.models import NETS, Head1d, Plain, Tied, build, norm_act, settle, with_norm
from tests.tools import assert_same_state


@pytest.fixture(params=AFFINE_KINDS)
def affine(request: pytest.FixtureRequest) -> Affine:
    return request.param


def frozen(net: str, affine: Affine = "none") -> tuple[nn.Module, Tensor]:
    model, x = build(net)
    return fbn.convert(model, fbn.Freeze(affine), example_input=x), x


def live(net: str) -> tuple[nn.Module, Tensor]:
    return build(net)


def peer(broken: bool, who: str) -> None:
    """Skip, with the words for it, where the peer does not break any more."""
    if not broken:
        pytest.skip(f"{who} does not break here any more")


def raises(error: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object]) -> bool:
    """Tell whether a call of a peer raises."""
    try:
        call()
    except error:
        return True
    return False


def constants(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of everything in the frozen layers of a model that must not move."""
    return {
        f"{name}.{key}": value.clone()
        for name, module in model.named_modules()
        if isinstance(module, FrozenBatchNorm)
        for key, value in module.named_buffers(recurse=False)
    }


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return any(not torch.equal(value, after[name]) for name, value in before.items())


# "I froze it and it still moves"


def test_requires_grad_alone_leaves_statistics_moving() -> None:
    """ultralytics#9391, OML `freeze_n_epochs`, discuss.pytorch.org/t/137904: only `requires_grad` is switched off."""
    model, x = frozen("plain")
    before = constants(model)
    model.requires_grad_(False).train()(x)
    assert not changed(before, constants(model))
    theirs, _ = live("plain")
    before = statistics(theirs)
    theirs.requires_grad_(False).train()(x)
    peer(changed(before, statistics(theirs)), "BatchNorm with requires_grad=False")


def test_eval_mode_is_undone_by_the_next_call_of_train() -> None:
    """mmdet#346, mmdet#11729, deeplab-xception#140: `bn.eval()` does not survive `model.train()`."""
    model, x = frozen("plain")
    for layer in model.modules():
        layer.train()
    before = constants(model)
    model(x)
    assert not changed(before, constants(model))
    theirs, _ = live("plain")
    theirs.bn1.eval()
    theirs.bn2.eval()
    before = statistics(theirs)
    theirs.train()(x)
    peer(changed(before, statistics(theirs)), "bn.eval()")


def test_requires_grad_true_on_everything_brings_constants_back_to_life(affine: Affine) -> None:
    """mmdet#5642, Lightning `make_trainable`: unfreezing a part of the net trains gamma and beta again."""
    model, x = frozen("plain", affine)
    before = constants(model)
    optimizer = torch.optim.SGD(model.requires_grad_(True).train().parameters(), lr=0.1, weight_decay=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert not changed(before, constants(model))
    trained = {name for name, p in model.bn1.named_parameters() if p.grad is not None}
    assert trained == set(LEARNABLE[affine])


def test_lightnings_freeze_normalizes_by_the_batch_in_training_and_by_running_statistics_in_evaluation() -> None:
    """Lightning `BaseFinetuning.freeze(train_bn=False)` clears `track_running_stats` in training mode (PR #15063)."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    model, x = frozen("plain")
    callbacks.BaseFinetuning.freeze(model, train_bn=False)
    assert torch.equal(model.train()(x), model.eval()(x))
    torch.testing.assert_close(model.train()(x)[:1], model(x[:1]))
    theirs, _ = live("plain")
    callbacks.BaseFinetuning.freeze(theirs, train_bn=False)
    peer(not torch.allclose(theirs.train()(x), theirs.eval()(x), atol=0.1), "BaseFinetuning.freeze")


def test_lightnings_freeze_keeps_training_batch_norm_by_default() -> None:
    """Lightning `BaseFinetuning.freeze(train_bn=True)`, the default that BackboneFinetuning uses: #13902, #20629."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    model, x = frozen("plain", "original")
    callbacks.BaseFinetuning.freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
    before = copy.deepcopy(model.state_dict())
    model.train()(x)
    assert_same_state(model.state_dict(), before)
    theirs, _ = live("plain")
    callbacks.BaseFinetuning.freeze(theirs)
    before = statistics(theirs)
    theirs.train()(x)
    peer(theirs.bn1.weight.requires_grad and changed(before, statistics(theirs)), "BaseFinetuning.freeze")


def test_lightnings_unfreezing_reaches_no_constant() -> None:
    """Lightning `BaseFinetuning.make_trainable` turns BatchNorm on again."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    model, x = frozen("plain", "shift")
    before = constants(model)
    callbacks.BaseFinetuning.make_trainable(model)
    model.train()(x).sum().backward()
    assert not changed(before, constants(model))
    assert list(model.bn1.parameters()) == [model.bn1.bias]
    theirs, _ = live("plain")
    callbacks.BaseFinetuning.freeze(theirs, train_bn=False)
    callbacks.BaseFinetuning.make_trainable(theirs)
    peer(theirs.bn1.track_running_stats and theirs.bn1.weight.requires_grad, "BaseFinetuning.make_trainable")


def test_parameters_of_equal_value_are_taken_for_one_by_lightning() -> None:
    """Lightning `filter_on_optimizer` compares by `torch.equal`: a second BatchNorm weight, all ones, is left out."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    model = fbn.convert(nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)), fbn.Freeze("original"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for layer in model for p in (layer.weight, layer.bias)}  # equal in value, four all the same
    first = torch.optim.SGD([model[0].weight], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        left = callbacks.BaseFinetuning.filter_on_optimizer(first, [model[1].weight])
    peer(left == [], "filter_on_optimizer")


def test_metric_learning_trainers_freeze_by_class_name_until_the_next_train_and_train_gamma() -> None:
    """pytorch-metric-learning `freeze_trunk_batchnorm`: eval mode for names with "BatchNorm", affine still trained."""
    functions = pytest.importorskip("pytorch_metric_learning.utils.common_functions")
    model, x = frozen("head1d")
    model.apply(functions.set_layers_to_eval("BatchNorm"))
    before = constants(model)
    model.train()(x)
    assert not changed(before, constants(model))
    assert list(model.neck.parameters()) == []
    theirs, _ = live("head1d")
    theirs.apply(functions.set_layers_to_eval("BatchNorm"))
    before = statistics(theirs)
    theirs.train()(x).sum().backward()
    peer(changed(before, statistics(theirs)) and theirs.neck.weight.grad is not None, "freeze_trunk_batchnorm")


def test_metric_learning_trainers_miss_a_layer_with_another_name() -> None:
    """pytorch-metric-learning `set_layers_to_eval` looks for "BatchNorm" in the name of the class."""
    functions = pytest.importorskip("pytorch_metric_learning.utils.common_functions")

    class Norm(nn.BatchNorm2d):
        pass

    model = fbn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), Norm(4)), fbn.Freeze(), verify=False)
    assert isinstance(model[1], FrozenBatchNorm)
    theirs = nn.Sequential(nn.Conv2d(3, 4, 1), Norm(4)).train()
    theirs.apply(functions.set_layers_to_eval("BatchNorm"))
    peer(theirs[1].training, "set_layers_to_eval")


def test_metric_learning_samplers_draw_from_numpys_global_generator() -> None:
    """pytorch-metric-learning `MPerClassSampler`: what else draws decides the batches, and drawing changes the rest."""
    samplers = pytest.importorskip("pytorch_metric_learning.samplers")
    labels = torch.arange(20).repeat_interleave(4)
    ours = PKBatchSampler(labels, 4, 2, seed=0)

    def drawn(seed: int) -> tuple[list[list[int]], list[int]]:
        np.random.seed(seed)
        return list(ours.batches(0)), list(samplers.MPerClassSampler(labels, 2, 8, length_before_new_iter=80))

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert first[0] == again[0] == other[0]
    before = np.random.get_state()[1].tolist()
    list(ours)
    assert np.random.get_state()[1].tolist() == before
    peer(first[1] == again[1] != other[1], "MPerClassSampler")


def test_a_last_batch_of_one_is_an_error_for_live_batch_norm() -> None:
    """fastai#1352, pytorch-semseg#214, scvi-tools#2314: one value per channel cannot be normalized."""
    model, x = frozen("head1d")
    torch.testing.assert_close(model.train()(x[:1]), model(x)[:1])
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        live("head1d")[0].train()(x[:1])


# timm's freeze_batch_norm_2d


def test_timm_leaves_batch_norm_of_one_dimension_live() -> None:
    """timm `freeze_batch_norm_2d` skips BatchNorm1d: 48 of the 52 BN layers of levit_128s stay live (PR #876)."""
    timm = pytest.importorskip("timm")
    model = fbn.convert(timm.create_model("levit_128s"), fbn.Freeze(), verify=False)
    assert sum(isinstance(m, FrozenBatchNorm) for m in model.modules()) == 52
    assert not any(isinstance(m, _BatchNorm) for m in model.modules())
    theirs = timm.layers.freeze_batch_norm_2d(fbn.revert(model, verify=False))
    peer(sum(isinstance(m, _BatchNorm) for m in theirs.modules()) == 48, "freeze_batch_norm_2d")


def test_timm_shares_the_storage_of_the_statistics_with_the_layer_it_replaced() -> None:
    """timm `freeze_batch_norm_2d`: writing to one writes to the other."""
    layers = pytest.importorskip("timm.layers")
    bn = settle(nn.BatchNorm2d(4))
    ours = fbn.convert(bn, fbn.Freeze())
    assert ours.running_mean.data_ptr() != bn.running_mean.data_ptr()
    theirs = layers.freeze_batch_norm_2d(bn)
    peer(theirs.running_mean.data_ptr() == bn.running_mean.data_ptr(), "freeze_batch_norm_2d")


def test_timm_unties_a_layer_of_two_parents_and_freezes_a_layer_of_two_names_once() -> None:
    """timm `freeze_batch_norm_2d` walks `named_children`: of a layer under two names one stays BatchNorm."""
    layers = pytest.importorskip("timm.layers")
    model, _ = frozen("tied")
    assert model.first.bn is model.second.bn
    twice = nn.Module()
    twice.a = twice.b = settle(nn.BatchNorm2d(4))
    theirs = layers.freeze_batch_norm_2d(copy.deepcopy(twice))
    fbn.convert(twice, fbn.Freeze())
    assert twice.a is twice.b
    assert isinstance(twice.a, FrozenBatchNorm2d)
    untied = layers.freeze_batch_norm_2d(Tied())
    peer(untied.first.bn is not untied.second.bn or isinstance(theirs.b, nn.BatchNorm2d), "freeze_batch_norm_2d")


def test_timm_makes_float32_weights_for_a_float64_layer_without_affine() -> None:
    """timm `freeze_batch_norm_2d` with `affine=False`: its ones and zeros have the default dtype, on the CPU."""
    layers = pytest.importorskip("timm.layers")
    bn, x = settle(nn.BatchNorm2d(4, affine=False)).double().eval(), torch.randn(2, 4, 3, 3).double()
    ours = fbn.convert(copy.deepcopy(bn), fbn.Freeze())
    assert torch.equal(ours(x), bn(x))
    assert {t.dtype for name, t in ours.state_dict().items() if "tracked" not in name} == {torch.float64}
    peer(layers.freeze_batch_norm_2d(bn).weight.dtype == torch.float32, "freeze_batch_norm_2d")


@pytest.mark.parametrize("case", ["track_running_stats=False", "bias=False"])
def test_timm_crashes_on_a_layer_that_lacks_a_tensor(case: str) -> None:
    """timm `freeze_batch_norm_2d`: AttributeError on `track_running_stats=False` and on `bias=False`."""
    layers = pytest.importorskip("timm.layers")
    bn = nn.BatchNorm2d(4, track_running_stats=case != "track_running_stats=False")
    if case == "bias=False":
        bn.register_parameter("bias", None)
        assert isinstance(fbn.convert(copy.deepcopy(bn), fbn.Freeze()), FrozenBatchNorm2d)
    else:
        with pytest.raises(UnsupportedLayer, match="has no running statistics"):
            fbn.convert(bn, fbn.Freeze())
    peer(raises(AttributeError, lambda: layers.freeze_batch_norm_2d(bn)), "freeze_batch_norm_2d")


def test_timm_forgets_momentum_flags_mode_counter_and_hooks_on_the_way_there_and_back(affine: Affine) -> None:
    """timm `freeze_batch_norm_2d` then `unfreeze_batch_norm_2d`."""
    layers = pytest.importorskip("timm.layers")

    def make() -> tuple[nn.Module, list[int]]:
        bn, calls = settle(nn.BatchNorm2d(4, momentum=0.01)).eval(), []
        bn.weight.requires_grad_(False)
        bn.register_forward_hook(lambda *args: calls.append(1))
        return bn, calls

    def facts(bn: nn.Module, calls: list[int]) -> list[object]:
        bn(torch.ones(2, 4, 3, 3))
        return [bn.momentum, bn.weight.requires_grad, bn.training, int(bn.num_batches_tracked), len(calls)]

    ours, calls = make()
    assert facts(fbn.revert(fbn.convert(ours, fbn.Freeze(affine))), calls) == [0.01, False, False, 7, 1]
    theirs, calls = make()
    back = layers.unfreeze_batch_norm_2d(layers.freeze_batch_norm_2d(theirs))
    peer(facts(back, calls) != [0.01, False, False, 7, 1], "unfreeze_batch_norm_2d")


def test_timms_freeze_refuses_a_batch_norm_as_the_root() -> None:
    """timm `utils.freeze` on a root BatchNorm: AssertionError by design, because it cannot return the new root."""
    utils = pytest.importorskip("timm.utils")
    assert isinstance(fbn.convert(settle(nn.BatchNorm2d(4)), fbn.Freeze()), FrozenBatchNorm2d)
    with pytest.raises(AssertionError):
        utils.freeze(nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    "name",
    [
        "fastvit_t8",
        "repvgg_a0",
        "repghostnet_050",
        pytest.param("mobileone_s0", marks=pytest.mark.slow),
        pytest.param("nextvit_small", marks=pytest.mark.slow),
    ],
)
def test_timms_reparameterization_fails_on_timms_frozen_nets_and_works_on_ours_after_revert(name: str) -> None:
    """timm `reparameterize_model` after `freeze_batch_norm_2d`: `assert isinstance(branch, nn.BatchNorm2d)`."""
    timm = pytest.importorskip("timm")
    model, x = settle(timm.create_model(name, num_classes=4)).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        fbn.revert(fbn.convert(model, fbn.Freeze("merged"), example_input=x), verify=False)
        merged = timm.utils.reparameterize_model(model)
        assert len(find_batch_norms(merged)) < len(find_batch_norms(model))
        torch.testing.assert_close(merged(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        theirs = timm.layers.freeze_batch_norm_2d(model)
        fails = raises((AssertionError, AttributeError), lambda: timm.utils.reparameterize_model(theirs))
    peer(fails, "reparameterize_model")


@pytest.mark.parametrize(("name", "affine"), [("levit_128s", "merged"), ("repvit_m0_9", "none")])
def test_timms_fuse_reads_batch_norms_names_and_finds_them_in_frozen_layers(name: str, affine: Affine) -> None:
    """timm `fuse()` (levit.py, repvit.py) reads weight, bias, running_mean, running_var, eps of whatever it finds."""
    timm = pytest.importorskip("timm")
    model, size = settle(timm.create_model(name, num_classes=4)).eval(), 224 if name == "levit_128s" else 64
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        fbn.convert(model, fbn.Freeze(affine), verify=False)
        fused = timm.utils.reparameterize_model(model)
        torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert len(find_batch_norms(fused)) < len(find_batch_norms(model))


def test_timms_norm_act_layers_are_missed_by_those_who_match_the_exact_type() -> None:
    """opacus `ModuleValidator` looks up `type(m)`: a net of 49 `BatchNormAct2d` is called valid, and none replaced."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_efficientnet")
    assert fbn.plan(model, fbn.Freeze()).rows[0].kind == "BatchNormAct2d"
    acts = [m.act for m in model.modules() if isinstance(m, timm.layers.BatchNormAct2d)]
    fbn.convert(model, fbn.Freeze(), verify=False)
    assert [m.act for m in model.modules() if isinstance(m, FrozenBatchNorm)] == acts
    validators = pytest.importorskip("opacus.validators")
    peer(validators.ModuleValidator.is_valid(timm.create_model("test_efficientnet")), "opacus")


def test_learnable_frozen_layers_get_no_weight_decay_under_timms_rule() -> None:
    """detectron2 and mmengine list norm classes, and would decay gamma' and beta' of a class of ours."""
    optim = pytest.importorskip("timm.optim")
    model, _ = frozen("plain", "merged")
    no_decay, decay = optim.param_groups_weight_decay(model, 0.05)
    assert no_decay["weight_decay"] == 0.0
    held = {id(p) for p in no_decay["params"]}
    assert {id(p) for layer in (model.bn1, model.bn2) for p in layer.parameters()} <= held
    assert {id(p) for p in decay["params"]} == {id(m.weight) for m in (model.conv1, model.conv2, model.head)}


# Other frozen layers


def test_torchvisions_and_timms_frozen_layers_promote_half_precision_to_float32(affine: Affine) -> None:
    """torchvision `FrozenBatchNorm2d` and timm's return float32 for bfloat16: more memory than live BatchNorm."""
    ops, layers = pytest.importorskip("torchvision.ops"), pytest.importorskip("timm.layers")
    x = torch.randn(2, 4, 3, 3).bfloat16()
    ours = fbn.convert(settle(nn.BatchNorm2d(4)), fbn.Freeze(affine))
    assert ours(x).dtype == torch.bfloat16
    theirs = [ops.FrozenBatchNorm2d(4), layers.freeze_batch_norm_2d(nn.BatchNorm2d(4))]
    peer(any(layer(x).dtype == torch.float32 for layer in theirs), "FrozenBatchNorm2d")


@pytest.mark.parametrize("net", ["head1d", "sequence1d", "volume"])
def test_torchvisions_frozen_layer_is_for_images_only(net: str) -> None:
    """torchvision, timm and detectron2 have a frozen layer for four dimensions and no other."""
    ops = pytest.importorskip("torchvision.ops")
    model, x = frozen(net)
    assert model(x).shape[0] == x.shape[0]
    channels = find_batch_norms(model)[0].num_features
    wrong = torch.ones(1, channels, *[1] * (x.dim() - 2))
    if wrong.dim() < 4:
        peer(ops.FrozenBatchNorm2d(channels)(wrong).shape != wrong.shape, "FrozenBatchNorm2d")


def test_frozen_layers_made_of_buffers_can_train_nothing() -> None:
    """detectron2#1524: with `NORM="FrozenBN"` gradients for gamma and beta are impossible."""
    ops = pytest.importorskip("torchvision.ops")
    model, x = frozen("plain", "merged")
    model(x).sum().backward()
    assert model.bn1.weight.grad is not None
    peer(list(ops.FrozenBatchNorm2d(4).parameters()) == [], "FrozenBatchNorm2d")


def test_a_net_that_was_never_trained_is_frozen_at_nothing_and_nobody_says_so() -> None:
    """torchvision PR #5443: BatchNorm was frozen also where no pretrained weights were loaded."""
    reasons = [row.reason for row in fbn.plan(Plain(), fbn.Freeze()).rows]
    assert all("are the pretrained weights loaded?" in reason for reason in reasons)
    assert not any(row.reason for row in fbn.plan(settle(Plain()), fbn.Freeze()).rows)


def test_a_small_eps_lost_in_half_precision_gives_no_nan() -> None:
    """torchvision vision#2169, #2599: eps was 0, and a dead channel divided by zero in float16."""
    bn = nn.BatchNorm2d(2, eps=1e-7)
    bn.running_var.zero_()
    x = torch.ones(1, 2, 2, 2)
    for affine in AFFINE_KINDS:
        ours = fbn.convert(copy.deepcopy(bn), fbn.Freeze(affine))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.isfinite(ours(x.to(dtype))).all()


def test_layers_without_affine_do_not_stop_a_freeze() -> None:
    """fastai `BnFreeze` asks `next(layer.parameters())`, and a layer with `affine=False` has none."""
    model = settle(with_norm(nn.BatchNorm2d(4, affine=False)))
    assert isinstance(fbn.convert(model, fbn.Freeze())[1], FrozenBatchNorm2d)
    with pytest.raises(StopIteration):
        next(nn.BatchNorm2d(4, affine=False).parameters())


def test_a_half_precision_layer_without_affine_runs(affine: Affine) -> None:
    """pytorch#61924: half precision input and `affine=False` did not go together."""
    bn = settle(nn.BatchNorm2d(4, affine=affine != "none")).half().eval()
    x = torch.randn(2, 4, 3, 3).half().requires_grad_()
    ours = fbn.convert(copy.deepcopy(bn), fbn.Freeze(affine))
    ours(x).float().sum().backward()
    assert ours(x).dtype == x.grad.dtype == torch.float16


# Averages of weights, and statistics gathered anew


def loader(x: Tensor) -> list[Tensor]:
    return [x + 3, x - 1]


def test_update_bn_estimates_frozen_statistics_anew_and_wakes_layers_in_eval_mode() -> None:
    """torch `update_bn` resets BatchNorm in eval mode, and ends by `model.train(was_training)` on all of the model."""
    model, x = frozen("plain", "shift")
    model.train().act.eval()
    before = copy.deepcopy(model.state_dict())
    update_bn(loader(x), model)
    assert_same_state(model.state_dict(), before)
    assert model.act.training is False  # it sees nothing to do and leaves the modes alone
    theirs, _ = live("plain")
    theirs.train().bn1.eval()
    old = theirs.bn1.running_mean.clone()
    update_bn(loader(x), theirs)
    peer(not torch.equal(theirs.bn1.running_mean, old) or theirs.bn1.training, "update_bn")


@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_average_of_weights_needs_new_statistics_unless_they_are_frozen(use_buffers: bool, affine: Affine) -> None:
    """torch `AveragedModel` copies or averages BatchNorm's buffers, neither of which fits its weights (#84053)."""
    model, x = frozen("plain", affine)
    averaged = AveragedModel(model, use_buffers=use_buffers)
    before = constants(model)
    train(model, x, averaged)
    assert not changed(before, constants(model))
    assert not changed(before, constants(averaged.module))
    fbn.revert(averaged.module, example_input=x)
    theirs, _ = live("plain")
    average = AveragedModel(theirs, use_buffers=use_buffers)
    train(theirs, x, average)
    before = statistics(average.module)
    update_bn(loader(x), average)
    peer(changed(before, statistics(average.module)), "AveragedModel")


def train(model: nn.Module, x: Tensor, averaged: AveragedModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in loader(x):
        optimizer.zero_grad()
        model.train()(batch).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)


def test_an_average_made_before_the_conversion_is_out_of_line_and_one_made_after_it_is_not() -> None:
    """torch `AveragedModel` zips parameters without a check: converting the source later averages the wrong ones."""
    model, x = frozen("plain", "merged")
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    with torch.no_grad():
        model.bn2.bias.add_(2.0)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module.bn2.bias, model.bn2.bias - 1.0)
    theirs, _ = live("plain")
    early = AveragedModel(theirs)
    fbn.convert(theirs, fbn.Freeze("shift"), example_input=x)
    with torch.no_grad():
        theirs.bn1.bias.add_(2.0)
    fails = raises(RuntimeError, lambda: early.update_parameters(theirs))  # where the shapes happen to differ
    peer(fails or not torch.equal(early.module.bn1.bias, theirs.bn1.bias), "AveragedModel")


def test_moving_averages_of_weights_lag_behind_in_the_statistics_too() -> None:
    """timm `ModelEmaV3` averages BatchNorm's buffers as it does weights: timm#102, #106, #224, #245."""
    utils = pytest.importorskip("timm.utils")
    results = {}
    for name, (model, x) in {"frozen": frozen("plain"), "live": live("plain")}.items():
        ema = utils.ModelEmaV3(model, decay=0.9)
        for batch in loader(x):
            model.train()(batch)
            ema.update(model)
        results[name] = changed(statistics(ema.module), statistics(model))
    assert results["frozen"] is False
    peer(results["live"], "ModelEmaV3")


def test_replacing_all_batch_norm_modules_makes_evaluation_depend_on_the_batch() -> None:
    """torch `replace_all_batch_norm_modules_` and tent set `running_mean` to None: every mode uses the batch."""
    model, x = frozen("plain")
    expected = model.eval()(x)
    torch.func.replace_all_batch_norm_modules_(model)
    assert torch.equal(model(x), expected)
    theirs, _ = live("plain")
    torch.func.replace_all_batch_norm_modules_(theirs.eval())
    with pytest.raises(UnsupportedLayer, match="has no running statistics"):
        fbn.convert(theirs, fbn.Freeze())
    peer(not torch.allclose(theirs(x)[:1], theirs(x[:1])), "replace_all_batch_norm_modules_")


def test_loading_weights_writes_in_place_and_keeps_every_reference_valid(affine: Affine) -> None:
    """fvcore, fast-reid, pytorch#63916: statistics that are rebound break whoever holds the old tensor."""
    model, _ = frozen("plain", affine)
    held = dict(model.state_dict(keep_vars=True))
    model.load_state_dict(settle(Plain(), seed=4).state_dict())
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is held[name]


# SyncBatchNorm


def test_torchs_sync_conversion_finds_nothing_to_convert_in_a_frozen_net_and_drops_timms_activations() -> None:
    """torch `convert_sync_batchnorm` loses BatchNormAct2d's activation (timm#1254, pytorch#187298)."""
    pytest.importorskip("timm")
    model, x = frozen("norm_act")
    expected = model.eval()(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model
    assert torch.equal(converted(x), expected)
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(build("norm_act")[0].eval()).eval()
    lost = not torch.allclose(theirs(x), expected, atol=1e-5)
    if lost:  # the activation is still there, as a child that nothing calls: refused, by name
        with pytest.raises(UnsupportedLayer, match="1: holds drop, act besides"):
            fbn.convert(theirs, fbn.Freeze())
    peer(lost, "convert_sync_batchnorm")


def test_lightnings_sync_plugin_leaves_frozen_layers_alone_and_loses_the_class_of_live_ones() -> None:
    """Lightning `TorchSyncBatchNorm.revert`, mmengine `revert_sync_batchnorm`: what comes back is a `_BatchNormXd`."""
    layer_sync = pytest.importorskip("lightning.pytorch.plugins.layer_sync")
    plugin = layer_sync.TorchSyncBatchNorm()
    model, x = frozen("plain")
    layers = [site.module for site in find_batch_norms(model)]
    plugin.revert(plugin.apply(model))
    assert [site.module for site in find_batch_norms(model)] == layers
    theirs = plugin.revert(plugin.apply(live("plain")[0]))
    expected = theirs.eval()(x)
    lost = type(theirs.bn1) is not nn.BatchNorm2d
    fbn.convert(theirs, fbn.Freeze("merged"), example_input=x)  # and such layers convert and revert all the same
    torch.testing.assert_close(theirs.train()(x), expected)
    assert_same_state(fbn.revert(theirs, example_input=x).state_dict(), live("plain")[0].state_dict())
    peer(lost, "TorchSyncBatchNorm.revert")


# Training techniques


def test_gradient_checkpointing_updates_live_statistics_twice(affine: Affine) -> None:
    """pytorch#96136, #62471, fairscale#1035: the recomputed forward counts the batch a second time."""
    model, x = frozen("norm_act", affine)
    model[1].drop.p = 0.0
    model.train()
    before = constants(model)
    grads = {}
    for name, run in {"plain": model, "checkpointed": lambda x: checkpoint(model, x, use_reentrant=False)}.items():
        model.zero_grad()
        run(x).square().sum().backward()
        grads[name] = [p.grad.clone() for p in model.parameters()]
    assert not changed(before, constants(model))
    for one, other in zip(*grads.values(), strict=True):
        assert torch.equal(one, other)
    theirs, x = live("conv_twice")
    checkpoint(theirs.train(), x, use_reentrant=False).sum().backward()
    peer(int(theirs.bn1.num_batches_tracked) == 7 + 2, "gradient checkpointing")


def test_buffers_broadcast_between_two_forwards_and_one_backward_do_not_break_it(affine: Affine) -> None:
    """DDP writes the buffers of rank 0 into all ranks before each forward: pytorch#22095, #110363, #175024."""

    def two_forwards(model: nn.Module) -> None:
        first = model(x)
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.copy_(buffer.clone())
        (first.sum() + model(2 * x).sum()).backward()

    model, x = frozen("plain", affine)
    two_forwards(model)
    assert all(p.grad is not None for p in model.parameters())
    peer(raises(RuntimeError, lambda: two_forwards(live("plain")[0].eval())), "BatchNorm under a buffer broadcast")


def test_momentum_none_compiles_without_a_graph_break_when_frozen(affine: Affine) -> None:
    """pytorch#194504: a live BatchNorm with `momentum=None` cannot be compiled with `fullgraph=True`."""
    model, x = frozen("momentum_none", affine)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model.train(), backend="eager", fullgraph=True)(x), model(x))
    if affine == "none":
        theirs = torch.compile(live("momentum_none")[0].train(), backend="eager", fullgraph=True)
        peer(raises(torch._dynamo.exc.TorchDynamoException, lambda: theirs(x)), "torch.compile")


def test_models_with_a_patched_forward_can_neither_be_copied_nor_hooked_and_ours_can(affine: Affine) -> None:
    """mmengine's Tune mode replaces `model.forward`: pickling and hooks break. A layer so patched is refused."""
    model, x = frozen("plain", affine)
    assert "forward" not in vars(model)
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    patched, _ = live("plain")
    patched.bn1.forward = lambda x: x
    with pytest.raises(UnsupportedLayer, match=r"bn1: .*forward patched in"):
        fbn.convert(patched, fbn.Freeze())


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["parallel", "compiled"]
)
def test_wrapped_models_are_refused_by_name_before_anything_is_changed(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """composer's surgery refuses wrapped models too: optimizer, buckets and graphs already hold the old layers."""
    inner = settle(Head1d())
    with pytest.raises(FinetuneBNError, match="Convert first, wrap afterwards"):
        fbn.convert(wrap(inner), fbn.Freeze())
    assert isinstance(inner.neck, nn.BatchNorm1d)


@pytest.mark.parametrize("net", NETS)
def test_every_name_of_every_layer_is_in_the_plan(net: str) -> None:
    """No peer says what it left alone: timm, torchvision's and opacus's converters return silently."""
    model, x = build(net)
    planned = {name for row in fbn.plan(model, fbn.Freeze(), example_input=x).rows for name in row.names}
    there = {n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, _BatchNorm)}
    assert planned == there


def test_norm_layers_of_timm_that_nobody_freezes_are_named() -> None:
    """timm `freeze_batch_norm_2d` passes EvoNorm, InplaceABN and FRN by without a word."""
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(settle(norm_act()), layers.EvoNorm2dB0(4), layers.FilterResponseNormAct2d(4))
    left = [row for row in fbn.plan(model, fbn.Freeze()).rows if row.policy is None]
    assert [(row.names, row.kind) for row in left] == [(("1",), "EvoNorm2dB0")]  # the one that keeps statistics
    assert "left alone" in left[0].reason
