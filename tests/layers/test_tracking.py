"""What all layers have in common that track running statistics: a BatchNorm to everything but their training pass."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, update_bn

import finetune_bn as fbn
from finetune_bn.errors import UnsupportedLayer
from finetune_bn.layers import TrackingBatchNorm
from finetune_bn.layers.families import EVAL, GHOST, RENORM, STOCHASTIC, Family
from finetune_bn.layers.tracking import why_not_tracking
from tests import batch_references as reference
from tests.models import Plain, settle
from tests.references import as_array
from tests.tools import assert_same_state

C = 5
KINDS: dict[str, tuple[Family[Any], dict[str, Any]]] = {
    "ghost": (GHOST, {"groups": 3}),
    "renorm": (RENORM, {"r_max": 1.2, "d_max": 0.3}),
    "stochastic": (STOCHASTIC, {"p": 0.5}),
    "eval": (EVAL, {"alpha": 0.0}),
}
DIMENSIONS: dict[str, tuple[type[_BatchNorm], int, tuple[int, ...]]] = {
    "any": (nn.SyncBatchNorm, 0, (7, C, 4, 2)),
    "1d, no length": (nn.BatchNorm1d, 1, (12, C)),
    "1d": (nn.BatchNorm1d, 1, (7, C, 4)),
    "2d": (nn.BatchNorm2d, 2, (7, C, 4, 2)),
    "3d": (nn.BatchNorm3d, 3, (7, C, 2, 3, 2)),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def batch_norm(live: type[_BatchNorm] = nn.BatchNorm2d, **arguments: Any) -> _BatchNorm:
    bn = live(C, **arguments)
    settle(bn)
    return bn


def stand_in(kind: str, bn: _BatchNorm | None = None, dims: int = 2) -> Any:
    family, settings = KINDS[kind]
    return family[dims].from_batch_norm(batch_norm() if bn is None else bn, **settings)


def new(kind: str, dims: int = 2, **arguments: Any) -> Any:
    family, settings = KINDS[kind]
    return family[dims](C, **settings, **arguments)


def images(shape: tuple[int, ...] = (7, C, 4, 2)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 2 + 1


# In evaluation it is a BatchNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_output_in_eval_mode_is_that_of_batch_norm_bit_for_bit(kind: str, dimensions: str, dtype: torch.dtype) -> None:
    live, dims, shape = DIMENSIONS[dimensions]
    bn = batch_norm(live).to(dtype).eval()
    x = images(shape).to(dtype)
    layer = stand_in(kind, bn, dims)
    assert not layer.training
    assert torch.equal(layer(x), bn(x))
    assert torch.equal(layer(x)[:1], layer(x[:1]))


@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_training_moves_the_running_statistics_as_batch_norm_does_and_keeps_the_dtype(
    kind: str, dimensions: str
) -> None:
    live, dims, shape = DIMENSIONS[dimensions]
    bn, x = batch_norm(live), images(shape)
    mean, var = as_array(bn.running_mean), as_array(bn.running_var)
    layer = stand_in(kind, bn, dims)
    y = layer(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    array = as_array(x)
    expected = reference.moved(mean, reference.mean_and_var(array)[0], 0.1)
    np.testing.assert_allclose(as_array(layer.running_mean), expected, rtol=1e-5, atol=1e-6)
    expected = reference.moved(var, reference.unbiased_var(array), 0.1)
    np.testing.assert_allclose(as_array(layer.running_var), expected, rtol=1e-5)
    assert int(layer.num_batches_tracked) == 8


def test_bfloat16_activations_are_measured_in_float32_and_buffers_keep_their_dtype(kind: str) -> None:
    x = (images((64, C, 8, 8)) + 100).bfloat16()
    layer = stand_in(kind)
    layer.momentum = 1.0
    assert layer(x).dtype == torch.bfloat16
    np.testing.assert_allclose(as_array(layer.running_var), reference.unbiased_var(as_array(x)), rtol=1e-4)
    layer.to(torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert layer.running_var.dtype == torch.bfloat16
    np.testing.assert_allclose(as_array(layer.running_var), reference.unbiased_var(as_array(x)), rtol=8e-3)


def test_momentum_none_is_the_average_over_all_batches(kind: str) -> None:
    layer, batches = new(kind, momentum=None), images((20, C, 4, 2)).split(5)
    for batch in batches:
        layer(batch)
    means = np.stack([reference.mean_and_var(as_array(batch))[0] for batch in batches])
    variances = np.stack([reference.unbiased_var(as_array(batch)) for batch in batches])
    np.testing.assert_allclose(as_array(layer.running_mean), means.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(as_array(layer.running_var), variances.mean(0), rtol=1e-5)


def test_momentum_0_keeps_the_statistics_also_from_a_batch_of_nan(kind: str) -> None:
    layer = stand_in(kind, batch_norm(momentum=0.0))
    layer(torch.full((4, C, 2, 2), torch.nan))
    assert torch.equal(layer.running_mean, batch_norm().running_mean)
    assert torch.equal(layer.running_var, batch_norm().running_var)
    assert int(layer.num_batches_tracked) == 8


def test_with_track_running_stats_cleared_nothing_is_updated_as_in_batch_norm(kind: str) -> None:
    """Lightning's BaseFinetuning clears the flag of every `_BatchNorm`."""
    layer = stand_in(kind)
    before = copy.deepcopy(layer.state_dict())
    layer.track_running_stats = False
    layer(images())
    assert_same_state(layer.state_dict(), before)


def test_buffers_are_written_in_place(kind: str) -> None:
    """fast-reid binds new buffers in each step, which DDP, EMA and CUDA graphs do not notice (pytorch#63916)."""
    layer = stand_in(kind)
    addresses = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
    layer(images())
    layer(images((1, C, 1, 1)))
    assert {name: buffer.data_ptr() for name, buffer in layer.named_buffers()} == addresses


def test_two_forward_passes_before_a_backward_pass(kind: str) -> None:
    """The second one writes to buffers that the first one must not have kept (pytorch#22095)."""
    layer, x = stand_in(kind), images().requires_grad_()
    (layer(x).square().sum() + layer(x * 2).square().sum()).backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


# A batch of one value a channel


@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_a_single_value_is_normalized_by_the_running_statistics_and_counted(kind: str, dimensions: str) -> None:
    live, dims, shape = DIMENSIONS[dimensions]
    bn = batch_norm(live)
    one = images((1, C, *[1] * (len(shape) - 2)))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        bn(one)
    layer = stand_in(kind, bn, dims)
    before = copy.deepcopy(layer.state_dict())
    assert torch.equal(layer(one), bn.eval()(one))
    layer(one)
    assert int(layer.num_fallbacks) == 2
    assert_same_state(layer.state_dict(), before)
    layer(images(shape))
    assert int(layer.num_fallbacks) == 2


def test_one_image_of_many_pixels_is_no_single_value_and_an_empty_batch_is_no_error(kind: str) -> None:
    layer = stand_in(kind)
    layer(images((1, C, 4, 2)))
    assert int(layer.num_fallbacks) == 0
    assert layer(images((0, C, 4, 2))).shape == (0, C, 4, 2)
    assert torch.isfinite(layer.running_mean).all()


# What is stored, copied, turned back


def test_its_state_dict_is_batch_norms_and_loads_strictly_both_ways(kind: str) -> None:
    layer, bn, x = new(kind), batch_norm().eval(), images()
    layer(x)
    assert list(layer.state_dict()) == list(bn.state_dict())
    layer.eval().load_state_dict(bn.state_dict(), strict=True)
    assert torch.equal(layer(x), bn(x))
    layer.train()(x)
    back = batch_norm()
    back.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(back.eval()(x), layer.eval()(x))


def test_it_trains_the_very_parameters_of_the_batch_norm_and_leaves_the_rest_of_it_alone(kind: str) -> None:
    bn = batch_norm()
    layer = stand_in(kind, bn)
    assert layer.weight is bn.weight
    assert layer.bias is bn.bias
    layer(images())
    assert_same_state(bn.state_dict(), batch_norm().state_dict())
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_it_turns_back_into_the_batch_norm_with_todays_values(kind: str) -> None:
    bn = batch_norm(momentum=0.03, eps=1e-3)
    layer = stand_in(kind, bn)
    x = images()
    layer(x).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    expected = layer.eval()(x)
    back = layer.to_batch_norm()
    assert back is bn
    assert (back.momentum, back.eps, back.training) == (0.03, 1e-3, False)
    assert torch.equal(back(x), expected)
    assert_same_state(back.state_dict(), layer.state_dict())


@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_a_layer_that_never_was_a_batch_norm_turns_into_one_of_its_dimensions(kind: str, dimensions: str) -> None:
    live, dims, shape = DIMENSIONS[dimensions]
    layer = new(kind, dims, eps=1e-3, momentum=None, affine=False).eval()
    back = layer.to_batch_norm()
    assert type(back) is live
    assert (back.eps, back.momentum, back.affine) == (1e-3, None, False)
    assert torch.equal(back(images(shape)), layer(images(shape)))


@pytest.mark.parametrize("missing", [("weight", "bias"), ("bias",)], ids=["affine=False", "bias=False"])
def test_missing_gamma_and_beta_stay_missing(kind: str, missing: tuple[str, ...]) -> None:
    """fast-reid repeats them whether they are there or not, batchrenorm trains them whether asked to or not."""
    bn = batch_norm()
    for name in missing:
        bn.register_parameter(name, None)
    keys = set(bn.state_dict())
    layer = stand_in(kind, bn)
    layer(images()).square().sum()
    assert set(layer.state_dict()) == keys
    assert set(layer.to_batch_norm().state_dict()) == keys


def test_hooks_attributes_and_flags_come_along_and_go_back(kind: str) -> None:
    bn = batch_norm()
    bn.weight.requires_grad_(False)
    calls: list[str] = []
    handle = bn.register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    layer = stand_in(kind, bn)
    layer(images())
    layer.to_batch_norm()(images())
    handle.remove()
    layer(images())
    assert calls == [type(layer).__name__, "BatchNorm2d"]
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_by_themselves(kind: str, way: str) -> None:
    layer, x = stand_in(kind), images()
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(layer)
    assert other.settings == layer.settings
    torch.manual_seed(0)
    expected = layer(x)
    torch.manual_seed(0)
    assert torch.equal(other(x), expected)
    assert_same_state(other.state_dict(), layer.state_dict())
    assert other.to_batch_norm().weight is other.weight
    assert other.weight is not layer.weight


def test_on_the_meta_device_it_can_be_filled_later(kind: str) -> None:
    with torch.device("meta"):
        layer = stand_in(kind, nn.BatchNorm2d(C))
    layer.load_state_dict(batch_norm().state_dict(), assign=True)
    x = images()
    torch.manual_seed(0)
    y = layer(x)
    layer(images((1, C, 1, 1)))
    assert int(layer.num_fallbacks) == 1
    torch.manual_seed(0)
    assert torch.equal(y, stand_in(kind)(x))
    assert torch.equal(layer.to_batch_norm().running_mean, layer.running_mean)


@pytest.mark.parametrize(("mode", "momentum"), [(True, 0.1), (True, None), (False, 0.1)], ids=str)
def test_compiles_without_a_graph_break(kind: str, mode: bool, momentum: float | None) -> None:
    """momentum=None breaks torch's own layer (pytorch#194504)."""
    torch._dynamo.reset()
    layers = [stand_in(kind, batch_norm(momentum=momentum)).train(mode) for _ in range(2)]
    compiled = torch.compile(layers[0], backend="aot_eager", fullgraph=True)
    for step in range(2):  # the second batch is smaller, as the last one of an epoch
        results = []
        for run, layer in ((compiled, layers[0]), (layers[1], layers[1])):
            x = images((7 - step, C, 4, 2)).requires_grad_()
            torch.manual_seed(step)
            y = run(x)
            results.append((y, *torch.autograd.grad(y.pow(3).sum(), [x, *layer.parameters()])))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    for name, value in layers[1].state_dict().items():
        torch.testing.assert_close(layers[0].state_dict()[name], value)


def test_a_trained_layer_exports_in_eval_mode(kind: str) -> None:
    layer, x = stand_in(kind).eval(), images()
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize(
    ("dims", "wrong", "message"),
    [
        (0, (C,), "expected at least 2D"),
        (1, (2, C, 2, 2), "expected 2D or 3D"),
        (2, (2, C), "expected 4D"),
        (2, (2, C, 3), "expected 4D"),
        (3, (2, C, 2, 2), "expected 5D"),
    ],
)
def test_an_input_of_other_rank_is_refused_in_batch_norms_words(
    kind: str, dims: int, wrong: tuple[int, ...], message: str
) -> None:
    """Also where torch would broadcast: batchrenorm's tests, test_batchnorm1d to 3d."""
    with pytest.raises(ValueError, match=rf"{message} input \(got {len(wrong)}D input\)"):
        new(kind, dims)(torch.ones(wrong))


# To other tools it is a `_BatchNorm`, and none of the three


def test_it_is_a_batch_norm_to_what_re_estimates_and_to_nothing_that_replaces(kind: str) -> None:
    layer = new(kind)
    assert isinstance(layer, (TrackingBatchNorm, _BatchNorm))
    assert not isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm))


def converters() -> list[Callable[[nn.Module], nn.Module]]:
    timm = pytest.importorskip("timm")
    return [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm]


def test_conversion_to_sync_batch_norm_is_refused_by_name(kind: str) -> None:
    for convert in converters():
        with pytest.raises(UnsupportedLayer, match=rf"plain SyncBatchNorm of this {type(new(kind)).__name__}\(5, "):
            convert(nn.Sequential(nn.Linear(2, 2), stand_in(kind)))


def test_quantization_may_set_its_own(kind: str) -> None:
    layer = new(kind)
    layer.qconfig = None
    assert layer.qconfig is None


def net(kind: str | None) -> nn.Module:
    torch.manual_seed(0)
    model = settle(Plain())
    if kind is not None:
        model.bn1, model.bn2 = (
            KINDS[kind][0][2].from_batch_norm(bn, **KINDS[kind][1]) for bn in (model.bn1, model.bn2)
        )
    return model


@pytest.mark.parametrize("way", ["update_bn", "Lightning's weight averaging"])
def test_statistics_are_re_estimated_as_those_of_batch_norm(kind: str, way: str) -> None:
    """From other weights' statistics, far off; the first layer's are BatchNorm's to rounding, the second's close."""
    loader = [torch.randn(16, 3, 9, 9) for _ in range(16)]
    statistics = {}
    for name in (kind, None):
        model = net(name)
        if way == "update_bn":
            model = AveragedModel(model)
            update_bn(loader, model)
            model = model.module
        else:  # StochasticWeightAveraging.reset_batch_norm_and_save_state, and the epoch behind it
            for layer in (model.bn1, model.bn2):
                layer.running_mean, layer.running_var = (
                    torch.zeros_like(layer.running_mean),
                    torch.ones_like(layer.running_var),
                )
                layer.momentum = None
                layer.num_batches_tracked *= 0
            for batch in loader:
                model(batch)
        statistics[name] = [(bn.running_mean, bn.running_var) for bn in (model.bn1, model.bn2)]
    for (mean, var), (bn_mean, bn_var), tolerance in zip(statistics[kind], statistics[None], (1e-5, 0.1), strict=True):
        torch.testing.assert_close(mean / bn_var.sqrt(), bn_mean / bn_var.sqrt(), rtol=0, atol=tolerance)
        torch.testing.assert_close(var, bn_var, rtol=tolerance, atol=0)


def test_update_bn_leaves_its_momentum_as_it_was(kind: str) -> None:
    model = net(kind)
    update_bn([torch.randn(4, 3, 9, 9)], model)
    assert (model.bn1.momentum, model.bn2.momentum) == (0.1, 0.01)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda bn: setattr(bn, "running_mean", None), "track_running_stats=False"),
        (lambda bn: setattr(bn, "num_batches_tracked", None), "no num_batches_tracked"),
        (lambda bn: bn.running_var.fill_(torch.nan), "running_var has 5 values"),
        (lambda bn: bn.running_mean.fill_(torch.inf), "running_mean has 5 values"),
        (lambda bn: None, None),
    ],
)
def test_what_it_cannot_stand_for_is_said(spoil: Callable[[nn.Module], Any], reason: str | None) -> None:
    bn = batch_norm()
    spoil(bn)
    assert (why_not_tracking(bn) is None) if reason is None else (reason in (why_not_tracking(bn) or ""))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "policy",
    [fbn.Ghost(2), fbn.Renorm(), fbn.Stochastic(), fbn.EvalNorm(0.1), fbn.Freeze(fold="never"), fbn.ToGroupNorm()],
    ids=lambda p: p.describe(),
)
def test_layers_can_be_inspected_mocked_and_quantized_around(policy: fbn.Policy) -> None:
    """Python expects AttributeError where a layer has no qconfig; `hasattr` raised a ValueError."""
    import inspect
    from unittest.mock import create_autospec

    import torch.ao.quantization as quantization

    def net() -> nn.Module:
        return fbn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), settle(nn.BatchNorm2d(4)), nn.ReLU()).train(), policy)

    layer = net()[1]  # type: ignore[index]
    assert not hasattr(layer, "qconfig")
    assert "weight" in dict(inspect.getmembers(layer))
    assert create_autospec(layer).eps is not None
    for prepare, mode in ((quantization.prepare, False), (quantization.prepare_qat, True)):
        model = net().train(mode)
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm") if mode else quantization.default_qconfig
        prepared = prepare(model)
        prepared(torch.randn(4, 3, 8, 8))
        done = quantization.convert(prepared.eval())
        assert type(done[1]) is type(layer)  # ours stays what it is
        assert not isinstance(done[0], nn.Conv2d) or "quantized" in type(done[0]).__module__


def test_a_qconfig_that_was_set_is_read_and_taken_away() -> None:
    layer = fbn.convert(settle(nn.BatchNorm2d(4)), fbn.Ghost(2))
    layer.qconfig = "set"
    assert layer.qconfig == "set"
    del layer.qconfig
    with pytest.raises(AttributeError, match="no attribute 'qconfig'"):
        del layer.qconfig
    with pytest.raises(UnsupportedLayer, match="convert_sync_batchnorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))
