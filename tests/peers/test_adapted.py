"""What the peers' own tests ask of frozen layers and of module surgery, asked of ours; written anew.

Each docstring names the file and the test that the question comes from.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import finetune_bn as fbn
from finetune_bn.conversion.policies import Rule
from finetune_bn.layers import FrozenBatchNorm, FrozenBatchNorm2d
from finetune_bn.layers.frozen import AFFINE_KINDS, Affine
from finetune_bn.layers.sites import find_batch_norms
from tests.models import NETS, Tied, build, settle, with_norm
from tests.references import as_array, values_of
from tests.tools import assert_same_state


@pytest.fixture(params=AFFINE_KINDS)
def affine(request: pytest.FixtureRequest) -> Affine:
    return request.param


def timm_net(name: str = "test_resnet") -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return settle(timm.create_model(name, num_classes=4))


def frozen_names(model: nn.Module) -> set[str]:
    return {n for site in find_batch_norms(model) for n in site.names if isinstance(site.module, FrozenBatchNorm)}


# timm tests/test_utils.py


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_the_whole_net_freezes_and_unfreezes(name: str, affine: Affine) -> None:
    """timm tests/test_utils.py::test_freeze_unfreeze, the part on all modules."""
    model = timm_net(name)
    before, layers = copy.deepcopy(model.state_dict()), len(find_batch_norms(model))
    fbn.convert(model, fbn.Freeze(affine), verify=False)
    assert len(frozen_names(model)) == layers
    fbn.revert(model, verify=False)
    assert frozen_names(model) == set()
    assert len(find_batch_norms(model)) == layers
    assert_same_state(model.state_dict(), before)


def test_named_parts_freeze_and_unfreeze() -> None:
    """timm tests/test_utils.py::test_freeze_unfreeze, the part on some submodules."""
    model = timm_net()
    rules = fbn.Rules([("bn1", fbn.Freeze()), ("layer1.*", fbn.Freeze("shift")), ("layer2.0.bn1", fbn.Freeze())])
    fbn.convert(model, rules, verify=False)
    expected = {n for n, _ in model.named_modules() if n in ("bn1", "layer2.0.bn1")}
    expected |= {n for site in find_batch_norms(model) for n in site.names if n.startswith("layer1.")}
    assert frozen_names(model) == expected
    assert len(expected) < len(find_batch_norms(model))
    fbn.revert(model.layer1, verify=False)
    assert frozen_names(model) == {"bn1", "layer2.0.bn1"}
    fbn.revert(model, verify=False)
    assert frozen_names(model) == set()


def test_a_root_batch_norm_freezes_and_unfreezes(affine: Affine) -> None:
    """timm tests/test_utils.py::test_freeze_unfreeze_bn_root: there an error, here a conversion."""
    bn = settle(nn.BatchNorm2d(10))
    frozen = fbn.convert(bn, fbn.Freeze(affine))
    assert isinstance(frozen, FrozenBatchNorm2d)
    assert isinstance(fbn.revert(frozen), nn.BatchNorm2d)


def test_a_part_is_named_by_a_string() -> None:
    """timm tests/test_utils.py::test_freeze_unfreeze_string_input: one name instead of a list of names."""
    model = timm_net()
    fbn.convert(model, fbn.Rules([("layer1.0.bn1", fbn.Freeze())]), verify=False)
    assert frozen_names(model) == {"layer1.0.bn1"}
    fbn.revert(model.layer1, verify=False)
    assert frozen_names(model) == set()


@pytest.mark.parametrize("name", ["test_byobnet", "repvit_m0_9"])
def test_a_reparameterized_net_computes_the_same_and_the_original_still_trains(name: str) -> None:
    """timm tests/test_utils.py::test_reparameterize_model, behind a conversion and its undoing."""
    timm = pytest.importorskip("timm")
    model, x = timm_net(name).eval(), torch.randn(1, 3, 64, 64)
    fbn.revert(fbn.convert(model, fbn.Freeze("original"), verify=False), verify=False)
    with torch.no_grad():
        expected = model(x)
        deployed = timm.utils.reparameterize_model(model)
        torch.testing.assert_close(deployed(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    model.train()(torch.cat([x, -x])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# torchvision test/test_ops.py


def test_the_repr_gives_channels_and_eps() -> None:
    """torchvision test/test_ops.py::TestFrozenBNT::test_frozenbatchnorm2d_repr."""
    assert repr(FrozenBatchNorm2d(32, eps=1e-3)) == "FrozenBatchNorm2d(32, eps=0.001, affine='none')"


@pytest.mark.parametrize("seed", range(10))
def test_a_batch_norms_state_with_its_counter_loads_and_gives_its_eval_output(seed: int, affine: Affine) -> None:
    """torchvision test/test_ops.py::TestFrozenBNT::test_frozenbatchnorm2d_eps."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand((4, 8, 6, 6), generator=generator)
    state = {name: torch.rand(8, generator=generator) for name in ("weight", "bias", "running_mean", "running_var")}
    state["num_batches_tracked"] = torch.tensor(100)
    for eps in (1e-5, 1e-3):
        frozen, bn = FrozenBatchNorm2d(8, eps=eps, affine=affine), nn.BatchNorm2d(8, eps=eps).eval()
        frozen.load_state_dict(state)
        bn.load_state_dict(state)
        torch.testing.assert_close(frozen(x), bn(x), rtol=1e-5, atol=1e-6)
        assert frozen.num_batches_tracked == 100


def test_a_state_dict_of_torchvisions_frozen_layer_loads_strictly_both_ways(affine: Affine) -> None:
    """torchvision test/test_ops.py::TestFrozenBNT::test_frozenbatchnorm2d_eps, from its layer: it has no counter."""
    ops = pytest.importorskip("torchvision.ops")
    theirs, ours, x = ops.FrozenBatchNorm2d(4), FrozenBatchNorm2d(4, affine=affine), torch.randn(2, 4, 3, 3)
    theirs.load_state_dict(settle(nn.BatchNorm2d(4)).state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


# detectron2 tests/layers/test_blocks.py, tests/test_export_torchscript.py


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("input_trained", [True, False])
@pytest.mark.parametrize("recording", [True, False], ids=["grad", "no_grad"])
def test_under_autocast_half_precision_stays_half_precision(
    affine: Affine, dtype: torch.dtype, input_trained: bool, recording: bool
) -> None:
    """detectron2 tests/layers/test_blocks.py::test_frozen_batchnorm_fp16, on the CPU and on both paths."""
    bn, x = settle(nn.BatchNorm2d(10)), torch.randn(1, 10, 4, 4).to(dtype).requires_grad_(input_trained)
    frozen = fbn.convert(bn, fbn.Freeze(affine))
    with torch.autocast("cpu", dtype), torch.set_grad_enabled(recording):
        y = frozen(x)
    assert y.dtype == dtype
    assert frozen.running_var.dtype == torch.float32
    reference = torch.from_numpy(values_of(bn).output(as_array(x)))
    torch.testing.assert_close(y.double(), reference, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("net", NETS)
def test_converted_nets_trace_script_and_reload(net: str, affine: Affine) -> None:
    """detectron2 tests/test_export_torchscript.py: a net with frozen layers through a file, in training mode too."""
    model, x = build(net)
    model = fbn.convert(model, fbn.Freeze(affine), example_input=x).eval()
    expected = model(x)
    modules = [torch.jit.trace(model, x)]
    if net not in ("conv_twice", "pre_activation"):  # their use of torch.nn.functional is nothing of ours
        modules.append(torch.jit.script(model))
    for module in modules:
        file = io.BytesIO()
        torch.jit.save(module, file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(x), expected)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("net", ["plain", "tied", "head1d", "volume"])
def test_converted_nets_export_and_reload(net: str, affine: Affine, mode: bool) -> None:
    """detectron2 tests/test_export_torchscript.py, with what came after TorchScript: torch.export."""
    model, x = build(net)
    model = fbn.convert(model, fbn.Freeze(affine), example_input=x).train(mode)
    exported = torch.export.export(model, (x,))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), model(x))
    batch_norms = [node for node in exported.graph.nodes if "batch_norm" in str(node.target)]
    assert batch_norms  # the deployed graph holds BatchNorm, which every backend can fold
    assert all(node.args[5] is False for node in batch_norms if len(node.args) > 5)


@pytest.mark.parametrize("net", ["plain", "norm_act"])
def test_an_exported_net_has_a_dynamic_batch(net: str) -> None:
    """detectron2 tests/test_export_torchscript.py: inputs of other sizes than the example."""
    model, x = build(net)
    model = fbn.convert(model, fbn.Freeze("merged"), example_input=x).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    many = x.repeat(3, 1, 1, 1)
    torch.testing.assert_close(exported(many), model(many))


# keras batch_normalization_test.py


def test_a_layer_that_is_not_trainable_infers_also_when_it_is_told_to_train(affine: Affine) -> None:
    """keras layers/normalization/batch_normalization_test.py::test_trainable_behavior."""
    bn, x = settle(nn.BatchNorm1d(3)), torch.randn(200, 3) * 5 + 10
    frozen = fbn.convert(bn, fbn.Freeze(affine)).train()
    state = copy.deepcopy(frozen.state_dict())
    for _ in range(5):
        frozen(x)
    assert_same_state(frozen.state_dict(), state)
    assert torch.equal(frozen(x), frozen.eval()(x))
    # Trainable again: a few steps of training, and the statistics are those of the data.
    bn = fbn.revert(frozen).train()
    for _ in range(100):
        bn(x)
    torch.testing.assert_close(bn.running_mean, x.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bn.running_var, x.var(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_variance_beyond_float16_stays_finite_under_autocast(affine: Affine, dtype: torch.dtype) -> None:
    """keras batch_normalization_test.py::test_large_value_within_autocast_scope: variance 70,000."""
    bn = nn.BatchNorm2d(3)
    bn.running_var.fill_(70000.0)
    frozen = fbn.convert(bn, fbn.Freeze(affine))
    x = torch.full((1, 3, 2, 2), 529.0).to(dtype)
    with torch.autocast("cpu", dtype):
        y = frozen(x.requires_grad_())
    y.float().sum().backward()
    expected = torch.full(y.shape, 529.0 / 70000**0.5)
    torch.testing.assert_close(y.detach().float(), expected, rtol=1e-2, atol=0)
    assert torch.isfinite(x.grad).all()
    assert (x.grad != 0).all()


# composer tests/utils/test_module_surgery.py


def test_every_layer_that_fits_is_replaced_and_no_other() -> None:
    """composer tests/utils/test_module_surgery.py::test_module_replacement."""
    model, _ = build("plain")
    others = [m for m in model.modules() if not isinstance(m, nn.BatchNorm2d)]
    fbn.convert(model, fbn.Rules([Rule(fbn.Freeze(), type="BatchNorm2d")]))
    assert [m for m in model.modules() if not isinstance(m, FrozenBatchNorm)] == others
    assert len(frozen_names(model)) == 2


def test_a_layer_of_several_parents_is_replaced_once_and_shared_again(affine: Affine) -> None:
    """composer tests/utils/test_module_surgery.py::test_module_replacement, with shared modules."""
    model = settle(Tied())
    model.alias = model.first  # a parent of two names
    fbn.convert(model, fbn.Freeze(affine))
    assert model.first.bn is model.second.bn is model.alias.bn
    assert isinstance(model.alias.bn, FrozenBatchNorm2d)


@pytest.mark.parametrize("net", ["tied", "plain", "norm_act"])
def test_no_parameter_is_there_twice(net: str, affine: Affine) -> None:
    """composer tests/utils/test_module_surgery.py::test_no_duplicate_params."""
    model, x = build(net)
    fbn.convert(model, fbn.Freeze(affine), example_input=x)
    parameters = list(model.parameters())
    assert len({id(p) for p in parameters}) == len(parameters)
    assert len({p.data_ptr() for p in parameters}) == len(parameters)
    tensors = [*parameters, *model.buffers()]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


def test_an_optimizer_made_before_goes_on_training_what_is_kept_and_nothing_that_is_gone() -> None:
    """composer tests/utils/test_module_surgery.py::test_params_removed, _kept and ::test_update_params_in_optimizer."""
    for affine in ("none", "shift", "original"):
        model, x = build("plain")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        fbn.convert(model, fbn.Freeze(affine), example_input=x)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in model.parameters()} <= held
        before = copy.deepcopy(model.state_dict())
        model(x).square().sum().backward()
        optimizer.step()
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == {name for name, _ in model.named_parameters()}


def test_merged_brings_parameters_of_its_own_that_an_optimizer_made_before_does_not_have() -> None:
    """composer tests/utils/test_module_surgery.py::test_new_params_added: so convert first, then make the optimizer."""
    model, x = build("plain")
    old = {id(p) for p in model.parameters()}
    fbn.convert(model, fbn.Freeze("merged"), example_input=x)
    new = {name for name, p in model.named_parameters() if id(p) not in old}
    assert new == {f"{bn}.{name}" for bn in ("bn1", "bn2") for name in ("weight", "bias")}


# mmengine tests/test_model/test_model_utils.py, test_averaged_model.py; ignite test_ema_handler.py


@pytest.mark.parametrize("first", ["sync", "freeze"])
def test_synchronized_layers_convert_and_go_back_to_what_they_were(first: str, affine: Affine) -> None:
    """mmengine tests/test_model/test_model_utils.py::test_revert_syncbn, ::test_convert_syncbn."""
    model, x = settle(nn.Sequential(nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8))).eval(), torch.randn(2, 3, 10, 10)
    expected = model(x)
    if first == "sync":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        fbn.convert(model, fbn.Freeze(affine), example_input=x)
        torch.testing.assert_close(model.train()(x), expected)  # a live SyncBatchNorm cannot train on a CPU
        fbn.revert(model, example_input=x)
        assert type(model[1]) is nn.SyncBatchNorm
    else:
        fbn.convert(model, fbn.Freeze(affine), example_input=x)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert isinstance(model[1], FrozenBatchNorm2d)
        fbn.revert(model, example_input=x)
        assert type(model[1]) is nn.BatchNorm2d
    assert torch.equal(model.eval()(x), expected)


def ema(model: nn.Module, momentum: float, use_buffers: bool) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - momentum), use_buffers=use_buffers)


def steps(model: nn.Module, averaged: AveragedModel, x: Tensor, number: int = 4) -> dict[str, Tensor]:
    """Train, average, and return the average of every parameter computed by hand."""
    by_hand: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(number):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
        for name, p in model.named_parameters():
            now = p.detach().double()
            by_hand[name] = now if name not in by_hand else 0.9 * by_hand[name] + 0.1 * now
    return by_hand


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("net", ["tied", "norm_act"])
def test_a_moving_average_is_that_of_the_trained_tensors_and_leaves_the_statistics_exact(
    net: str, affine: Affine, use_buffers: bool
) -> None:
    """mmengine test_averaged_model.py::test_ema_update_buffers, ignite test_ema_handler.py::test_ema_buffer."""
    model, x = build(net)
    fbn.convert(model, fbn.Freeze(affine), example_input=x)
    constants = {name: value.clone() for name, value in model.named_buffers()}
    averaged = ema(model, 0.1, use_buffers)
    by_hand = steps(model, averaged, x)
    for name, parameter in averaged.module.named_parameters():
        torch.testing.assert_close(parameter.double(), by_hand[name], rtol=1e-5, atol=1e-7)
    for name, buffer in averaged.module.named_buffers():
        if buffer.is_floating_point():  # torch rounds the average of equal counters down
            assert torch.equal(buffer, constants[name]), name
    # and the average reverts to BatchNorm of its own function
    averaged.module.eval()
    expected = averaged(x)
    back = fbn.revert(averaged.module, example_input=x)
    torch.testing.assert_close(back(x), expected, rtol=1e-4, atol=1e-5)


def test_a_moving_average_written_through_the_state_dict_reaches_the_layers(affine: Affine) -> None:
    """ignite test_ema_handler.py::test_ema_buffer: helpers that copy and lerp the tensors of two state dicts."""
    model, x = build("plain")
    fbn.convert(model, fbn.Freeze(affine), example_input=x)
    other = copy.deepcopy(model)
    steps(model, ema(model, 0.1, True), x)
    with torch.no_grad():
        for name, value in other.state_dict().items():
            if value.is_floating_point():
                value.lerp_(model.state_dict()[name], 1.0)
    torch.testing.assert_close(other.eval()(x), model.eval()(x))


# mmdetection and others: norm_eval


@pytest.mark.parametrize(("affine", "moves"), [("none", False), ("original", True)])
def test_norm_eval_with_and_without_requires_grad_has_a_name_each(affine: Any, moves: bool) -> None:
    """mmdet tests/test_models/test_backbones/test_resnet.py, `norm_eval` with `norm_cfg.requires_grad`."""
    model = settle(with_norm(nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 8, 8)
    fbn.convert(model, fbn.Freeze(affine), example_input=x)
    before = copy.deepcopy(model.state_dict())
    model.train()(x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert (not torch.equal(model[1].weight, before["1.weight"])) is moves
