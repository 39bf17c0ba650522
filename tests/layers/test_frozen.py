"""The frozen layer: a BatchNorm in eval mode, stored as one, whatever is done to the module that holds it."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import FinetuneBNError
from finetune_bn.functional.frozen import TOLERANCE, is_canonical
from finetune_bn.layers import FrozenBatchNorm, FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from finetune_bn.layers.frozen import AFFINE_KINDS, LEARNABLE, Affine, why_not_frozen
from tests.models import settle
from tests.references import as_array, values_of
from tests.tools import assert_same_state

C = 5
NAMES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
DIMENSIONS: dict[str, tuple[type[_BatchNorm], type[FrozenBatchNorm], tuple[int, ...]]] = {
    "1d, no length": (nn.BatchNorm1d, FrozenBatchNorm1d, (6, C)),
    "1d": (nn.BatchNorm1d, FrozenBatchNorm1d, (3, C, 4)),
    "2d": (nn.BatchNorm2d, FrozenBatchNorm2d, (3, C, 4, 2)),
    "3d": (nn.BatchNorm3d, FrozenBatchNorm3d, (2, C, 2, 3, 2)),
    "any": (nn.SyncBatchNorm, FrozenBatchNorm, (3, C, 4, 2)),
}


@pytest.fixture(params=AFFINE_KINDS)
def affine(request: pytest.FixtureRequest) -> Affine:
    return request.param


def batch_norm(**arguments: Any) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(C, **arguments)
    settle(bn)
    return bn.eval()


def freeze(bn: _BatchNorm, affine: Affine) -> FrozenBatchNorm2d:
    return FrozenBatchNorm2d.from_batch_norm(bn, affine)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, C, 4, 2, generator=torch.Generator().manual_seed(2)).to(dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Assert equality by the package's own table of tolerances."""
    tolerance = TOLERANCE[expected.dtype]
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * largest)


# What it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_output_is_that_of_batch_norm_in_eval_mode_bit_for_bit(
    dimensions: str, dtype: torch.dtype, affine: Affine
) -> None:
    live, frozen_class, shape = DIMENSIONS[dimensions]
    bn = settle(live(C)).eval().to(dtype)
    frozen = frozen_class.from_batch_norm(bn, affine)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = frozen(x)
    assert y.dtype == dtype
    # The values of `merged` are rounded once, when they are brought to canonical form; the layer that stands for
    # them, as a BatchNorm loads it, computes the same to the last bit.
    stored = live(C).eval().to(dtype)
    stored.load_state_dict(frozen.state_dict(), strict=True)
    assert torch.equal(y, stored(x))
    if affine == "merged":
        assert_close(y, bn(x))
    else:
        assert torch.equal(y, bn(x))


def test_training_mode_changes_nothing(affine: Affine) -> None:
    frozen, x = freeze(batch_norm(), affine), images()
    expected, state = frozen.eval()(x), copy.deepcopy(frozen.state_dict())
    frozen.train()
    assert torch.equal(frozen(x), expected)
    assert_same_state(frozen.state_dict(), state)


def test_the_output_of_an_image_does_not_depend_on_its_batch_as_it_does_for_a_live_layer(affine: Affine) -> None:
    x = images()
    frozen, live = freeze(batch_norm(), affine).train(), batch_norm().train()
    assert torch.equal(frozen(x)[:1], frozen(x[:1]))
    assert not torch.allclose(live(x)[:1], live(x[:1]))


@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_gradients_are_the_formula(dimensions: str, affine: Affine) -> None:
    live, frozen_class, shape = DIMENSIONS[dimensions]
    frozen = frozen_class.from_batch_norm(settle(live(C)).double(), affine)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = frozen(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    reference = values_of(frozen).gradients(as_array(x), as_array(upstream))
    torch.testing.assert_close(x.grad, torch.from_numpy(reference["x"]))
    for name, parameter in frozen.named_parameters():
        torch.testing.assert_close(parameter.grad, torch.from_numpy(reference[name]))
    if affine == "merged":
        others = [d for d in range(x.dim()) if d != 1]
        torch.testing.assert_close(frozen.weight.grad, (upstream * x.detach()).sum(others))


def test_a_step_of_sgd_on_merged_moves_the_scale_var_plus_eps_times_as_far_as_on_original() -> None:
    bn = batch_norm(eps=1e-3)
    bn.running_mean.zero_()  # so that the scale alone moves the output
    steps = {}
    for affine in ("merged", "original"):
        frozen, x = freeze(copy.deepcopy(bn), affine).double(), images(torch.float64)
        before = values_of(frozen).scale
        optimizer = torch.optim.SGD(frozen.parameters(), lr=0.1)
        frozen(x).square().sum().backward()
        optimizer.step()
        steps[affine] = torch.from_numpy(values_of(frozen).scale - before)
    torch.testing.assert_close(steps["merged"] / steps["original"], bn.running_var.double() + bn.eps, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("frozen_class", "wrong"),
    [
        (FrozenBatchNorm1d, (2, C, 2, 2)),
        (FrozenBatchNorm2d, (2, C)),
        (FrozenBatchNorm3d, (2, C, 2, 2)),
        (FrozenBatchNorm, (C,)),
    ],
)
def test_an_input_of_other_rank_is_refused_in_batch_norms_words(
    frozen_class: type[FrozenBatchNorm], wrong: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=rf"expected .*input \(got {len(wrong)}D input\)"):
        frozen_class(C)(torch.ones(wrong))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_compiles_without_a_graph_break_in_either_mode(affine: Affine, mode: bool) -> None:
    torch._dynamo.reset()
    frozen, x = freeze(batch_norm(momentum=None), affine).train(mode), images().requires_grad_()
    compiled = torch.compile(frozen, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), frozen(x))
    results = []
    for module in (compiled, frozen):
        results.append(torch.autograd.grad(module(x).square().sum(), [x, *frozen.parameters()]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_per_sample_gradients_work_through_functional_call(affine: Affine) -> None:
    frozen, x = freeze(batch_norm(), affine), images()
    parameters = {name: p.detach() for name, p in frozen.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(frozen, parameters, (image[None],)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    if parameters:
        frozen(x).square().sum().backward()
    assert gradients.keys() == set(LEARNABLE[affine])
    for name, parameter in frozen.named_parameters():
        torch.testing.assert_close(gradients[name].sum(0), parameter.grad)


# What is trained


def test_exactly_the_learnable_tensors_are_parameters_and_the_constants_cannot_be_woken(affine: Affine) -> None:
    frozen = freeze(batch_norm(), affine)
    assert tuple(name for name, _ in frozen.named_parameters()) in {LEARNABLE[affine], LEARNABLE[affine][::-1]}
    frozen.requires_grad_(True)
    trained = {name for name, tensor in frozen.state_dict(keep_vars=True).items() if tensor.requires_grad}
    assert trained == set(LEARNABLE[affine])


def test_shift_and_original_train_the_very_parameters_of_the_batch_norm_and_merged_has_its_own() -> None:
    bn = batch_norm()
    assert freeze(bn, "shift").bias is bn.bias
    original = freeze(bn, "original")
    assert original.weight is bn.weight
    assert original.bias is bn.bias
    merged = freeze(bn, "merged")
    assert merged.weight is not bn.weight
    assert not torch.equal(merged.weight, bn.weight)


def test_making_the_frozen_layer_leaves_the_batch_norm_as_it_was(affine: Affine) -> None:
    bn, untouched = batch_norm(), batch_norm()
    frozen = freeze(bn, affine)
    with torch.no_grad():
        for name, buffer in frozen.named_buffers():
            buffer.add_(1)
            assert name in NAMES
    assert_same_state(bn.state_dict(), untouched.state_dict())


def test_requires_grad_is_carried_over_and_back(affine: Affine) -> None:
    bn = batch_norm()
    bn.weight.requires_grad_(False)
    frozen = freeze(bn, affine)
    assert {name: p.requires_grad for name, p in frozen.named_parameters()} == {
        name: name == "bias" for name in LEARNABLE[affine]
    }
    back = frozen.to_batch_norm()
    assert (back.weight.requires_grad, back.bias.requires_grad) == (False, True)


def test_an_unknown_affine_is_one_clear_error() -> None:
    with pytest.raises(FinetuneBNError, match=r"affine: got 'gamma'; allowed: 'none', 'shift', 'merged', 'original'"):
        FrozenBatchNorm2d(C, affine="gamma")


@pytest.mark.parametrize(
    ("change", "affine", "reason"),
    [
        (lambda bn: bn.running_var.__setitem__(1, -1e-6), "none", "running_var has 1 values .* negative"),
        (lambda bn: bn.running_var.__setitem__(slice(2), float("inf")), "none", "running_var has 2 values .* infinite"),
        (lambda bn: bn.running_mean.__setitem__(0, float("nan")), "shift", "running_mean has 1 values that are NaN"),
        (lambda bn: bn.register_parameter("bias", None), "shift", "has no bias that affine='shift' could train"),
        (lambda bn: bn.register_parameter("weight", None), "merged", "has no weight that affine='merged'"),
        (lambda bn: [bn.register_parameter(n, None) for n in ("weight", "bias")], "original", "no weight and no bias"),
        (lambda bn: [bn.register_buffer(n, None) for n in ("running_mean", "running_var")], "none", "no running stat"),
    ],
)
def test_what_cannot_be_frozen_is_said_with_the_reason(
    change: Callable[[nn.BatchNorm2d], object], affine: Affine, reason: str
) -> None:
    bn = batch_norm()
    assert why_not_frozen(bn, affine) is None
    with torch.no_grad():
        change(bn)
    assert re.search(reason, why_not_frozen(bn, affine) or "it can be frozen")


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_original_trains_the_one_of_the_two_that_is_there(missing: str) -> None:
    bn = batch_norm()
    bn.register_parameter(missing, None)
    assert why_not_frozen(bn, "original") is None
    frozen = freeze(bn, "original")
    assert {name for name, _ in frozen.named_parameters()} == {"weight", "bias"} - {missing}
    assert torch.equal(frozen(images()), bn(images()))
    assert_same_state(frozen.to_batch_norm().state_dict(), bn.state_dict())


# How it is stored


def test_it_is_no_batch_norm_to_those_who_look_for_one(affine: Affine) -> None:
    frozen = freeze(batch_norm(), affine)
    assert not isinstance(frozen, _BatchNorm)
    assert list(frozen.modules()) == [frozen]  # the source is not in the module tree
    assert frozen.affine is True
    assert repr(frozen) == f"FrozenBatchNorm2d({C}, eps=1e-05, affine={affine!r})"


def test_state_dicts_load_strictly_both_ways_and_compute_the_same(affine: Affine) -> None:
    bn, x = batch_norm(), images()
    fresh = FrozenBatchNorm2d(C, affine=affine)
    assert set(fresh.state_dict()) == set(NAMES)
    fresh.load_state_dict(bn.state_dict(), strict=True)
    assert_close(fresh(x), bn(x))
    back = nn.BatchNorm2d(C).eval()
    back.load_state_dict(fresh.state_dict(), strict=True)
    assert torch.equal(back(x), fresh(x))
    assert back.num_batches_tracked == 7


def test_state_dict_is_the_storage_itself(affine: Affine) -> None:
    frozen = freeze(batch_norm(), affine)
    for name, value in frozen.state_dict().items():
        assert value.data_ptr() == getattr(frozen, name).data_ptr()
    frozen.state_dict()["bias"].add_(1.0)  # how EMA helpers write
    torch.testing.assert_close(frozen(images()), freeze(batch_norm(), affine)(images()) + 1.0)


def test_merged_is_canonical_when_made_converted_and_loaded() -> None:
    made, converted, loaded = (
        FrozenBatchNorm2d(C, eps=1e-3, affine="merged"),
        freeze(batch_norm(eps=1e-3), "merged"),
        FrozenBatchNorm2d(C, eps=1e-3, affine="merged"),
    )
    loaded.load_state_dict(batch_norm(eps=1e-3).state_dict())
    for frozen in (made, converted, loaded):
        assert is_canonical(frozen.running_mean, frozen.running_var, 1e-3)
        # gamma' and beta' are what is stored, to the last bit
        x = torch.zeros(1, C, 1, 1)
        assert torch.equal(frozen(x).flatten(), frozen.bias)
    assert_same_state(loaded.state_dict(), converted.state_dict())


def test_merged_reloads_its_own_checkpoint_bit_for_bit_and_leaves_the_given_dict_alone() -> None:
    trained = freeze(batch_norm(), "merged")
    with torch.no_grad():
        trained.weight.mul_(1.1)
    for given in (trained.state_dict(), batch_norm().state_dict()):
        before = copy.deepcopy(dict(given))
        fresh = FrozenBatchNorm2d(C, affine="merged")
        fresh.load_state_dict(given, strict=True)
        assert_same_state(dict(given), before)
    fresh.load_state_dict(trained.state_dict(), strict=True)
    assert_same_state(fresh.state_dict(), trained.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_checkpoints_cross_precisions(dtype: torch.dtype, affine: Affine) -> None:
    bn, x = batch_norm(), images()
    half = FrozenBatchNorm2d(C, affine=affine, dtype=dtype)
    half.load_state_dict(bn.state_dict(), strict=True)
    assert half.weight.dtype == dtype
    assert_close(half(x.to(dtype)), bn(x).to(dtype))
    wide = FrozenBatchNorm2d(C, affine=affine)
    wide.load_state_dict(half.state_dict(), strict=True)
    assert wide.weight.dtype == torch.float32
    assert_close(wide(x).to(dtype), bn(x).to(dtype))


def test_assign_takes_dtype_and_tensors_of_the_checkpoint(affine: Affine) -> None:
    bn, x = batch_norm().double(), images(torch.float64)
    frozen = freeze(batch_norm(), affine)
    frozen.load_state_dict(bn.state_dict(), assign=True)
    assert frozen.weight.dtype == torch.float64
    assert_close(frozen(x), bn(x))
    assert {name for name, _ in frozen.named_parameters()} == set(LEARNABLE[affine])


def test_assign_of_parameters_does_not_make_constants_trainable() -> None:
    frozen = FrozenBatchNorm2d(C)
    frozen.load_state_dict({**batch_norm().state_dict(keep_vars=True)}, assign=True)
    assert list(frozen.parameters()) == []
    assert set(dict(frozen.named_buffers())) == set(NAMES)


def test_assigned_parameters_are_those_of_the_batch_norm_after_revert() -> None:
    frozen = freeze(batch_norm(), "original")
    frozen.load_state_dict(batch_norm().state_dict(), assign=True)
    weight = frozen.weight
    assert frozen.to_batch_norm().weight is weight  # an optimizer made in between goes on training it


def test_a_partial_state_dict_loads_its_part_where_strict_is_false(affine: Affine) -> None:
    frozen = freeze(batch_norm(), affine)
    before = copy.deepcopy(frozen.state_dict())
    missing, unexpected = frozen.load_state_dict({"bias": torch.full((C,), 3.0)}, strict=False)
    assert (set(missing), unexpected) == ({"weight", "running_mean", "running_var"}, [])
    assert_same_state(frozen.state_dict(), {**before, "bias": torch.full((C,), 3.0)})
    with pytest.raises(RuntimeError, match="Missing key"):
        frozen.load_state_dict({"bias": torch.zeros(C)}, strict=True)


def test_merged_refuses_statistics_without_the_affine_that_they_belong_to() -> None:
    frozen = freeze(batch_norm(), "merged")
    before = copy.deepcopy(frozen.state_dict())
    part = {name: value for name, value in batch_norm().state_dict().items() if name != "weight"}
    with pytest.raises(
        RuntimeError, match=r"takes weight, bias, running_mean and running_var together; missing \['wei"
    ):
        frozen.load_state_dict(part, strict=False)
    assert_same_state(frozen.state_dict(), before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("running_var", torch.full((C,), -0.5), "running_var has 5 values that are NaN, infinite or negative"),
        ("running_var", torch.full((C,), float("nan")), "running_var has 5 values that are NaN"),
        ("running_mean", torch.full((C,), float("inf")), "running_mean has 5 values that are NaN or infinite"),
        ("running_mean", torch.zeros(C + 1), r"size mismatch for layer\.running_mean: .*\(6,\).*\(5,\)"),
        ("weight", torch.zeros(C, 1), r"size mismatch for layer\.weight: .*\(5, 1\).*\(5,\)"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_bad_state_dict_is_one_clear_error_and_the_layer_stays_as_it_was(
    affine: Affine, name: str, value: Tensor, message: str, strict: bool
) -> None:
    model = nn.ModuleDict({"layer": freeze(batch_norm(), affine)})
    before = copy.deepcopy(model.state_dict())
    other = {f"layer.{key}": tensor + 1 for key, tensor in batch_norm().state_dict().items()}
    with pytest.raises(RuntimeError, match=message) as raised:
        model.load_state_dict({**other, f"layer.{name}": value}, strict=strict)
    assert str(raised.value).count("layer.") == 1
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize("version", [None, 1])
def test_checkpoints_from_before_num_batches_tracked_load_strictly(affine: Affine, version: int | None) -> None:
    frozen = freeze(batch_norm(), affine)
    old = batch_norm().state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = version
    frozen.load_state_dict(old, strict=True)
    assert frozen.num_batches_tracked == 7
    old._metadata[""]["version"] = 2
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        frozen.load_state_dict(old, strict=True)


def through_file(frozen: FrozenBatchNorm) -> FrozenBatchNorm:
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[FrozenBatchNorm], FrozenBatchNorm]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda frozen: pickle.loads(pickle.dumps(frozen)),
    "torch.save": through_file,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_whole_and_its_own(affine: Affine, way: str) -> None:
    frozen, x = freeze(batch_norm(), affine), images()
    expected = frozen(x).detach().clone()
    other = COPIES[way](frozen)
    assert torch.equal(other(x), expected)
    assert {name for name, _ in other.named_parameters()} == set(LEARNABLE[affine])
    if affine in ("shift", "original"):
        assert other.to_batch_norm().bias is other.bias
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers(), *other.to_batch_norm().parameters()):
            tensor.add_(1)
    assert torch.equal(frozen(x), expected)
    assert_same_state(frozen.to_batch_norm().state_dict(), batch_norm().state_dict())


# The way back


@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
def test_an_untouched_layer_turns_back_into_the_identical_batch_norm(affine: Affine, momentum: float | None) -> None:
    bn = batch_norm(momentum=momentum, eps=1e-3)
    parameters = dict(bn.named_parameters())
    frozen = freeze(bn, affine).train()
    back = frozen.to_batch_norm()
    assert back is bn
    assert back.training is True
    assert (back.momentum, back.eps) == (momentum, 1e-3)
    assert all(getattr(back, name) is parameter for name, parameter in parameters.items())
    assert_same_state(back.state_dict(), batch_norm(eps=1e-3).state_dict())


def test_a_trained_layer_turns_back_into_a_batch_norm_of_the_same_function(affine: Affine) -> None:
    frozen, x = freeze(batch_norm(), affine), images()
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter[1:] += 0.3
    expected = frozen(x).detach()
    back = frozen.to_batch_norm().eval()
    assert_close(back(x), expected)
    assert_same_state(
        {name: back.state_dict()[name] for name in NAMES[2:]},
        {name: batch_norm().state_dict()[name] for name in NAMES[2:]},
    )
    # The channel that was not trained is exact.
    assert torch.equal(back.weight[:1], batch_norm().weight[:1])
    assert torch.equal(back.bias[:1], batch_norm().bias[:1])


def test_a_merged_layer_that_reloaded_its_checkpoint_has_lost_its_statistics_and_keeps_its_function() -> None:
    trained = freeze(batch_norm(), "merged")
    assert trained.has_source_statistics
    reloaded = freeze(batch_norm(), "merged")
    reloaded.load_state_dict(trained.state_dict())
    assert not reloaded.has_source_statistics
    back = reloaded.to_batch_norm().eval()
    assert_same_state(back.state_dict(), trained.state_dict())
    assert torch.equal(back(images()), trained(images()))


def test_a_merged_layer_that_loaded_a_vanilla_checkpoint_turns_back_into_that_one_bit_for_bit() -> None:
    other = batch_norm()
    settle(other, seed=5)
    frozen = freeze(batch_norm(), "merged")
    frozen.load_state_dict(other.state_dict())
    assert frozen.has_source_statistics
    assert_same_state(frozen.to_batch_norm().state_dict(), other.state_dict())


@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_a_layer_that_was_never_a_batch_norm_turns_into_one(dimensions: str, affine: Affine) -> None:
    live, frozen_class, shape = DIMENSIONS[dimensions]
    frozen = frozen_class(C, eps=1e-3, momentum=None, affine=affine, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    back = frozen.to_batch_norm().eval()
    assert type(back) is live
    assert (back.eps, back.momentum, back.weight.dtype) == (1e-3, None, torch.float64)
    assert torch.equal(back(x), frozen(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_a_layer_moved_to_another_dtype_turns_back_in_that_dtype(
    affine: Affine, dtype: torch.dtype, trained: bool
) -> None:
    frozen, x = freeze(batch_norm(), affine), images(dtype)
    with torch.no_grad():
        for parameter in frozen.parameters() if trained else ():
            parameter += 0.3
    frozen.to(dtype)
    expected = frozen(x).detach()
    assert expected.dtype == dtype
    back = frozen.to_batch_norm().eval()
    assert {tensor.dtype for name, tensor in back.state_dict().items() if name in NAMES[:4]} == {dtype}
    assert_close(back(x), expected)


def test_on_the_meta_device_it_converts_loads_by_assign_and_turns_back(affine: Affine) -> None:
    with torch.device("meta"):
        frozen = freeze(nn.BatchNorm2d(C), affine)
    assert {tensor.device.type for tensor in frozen.state_dict().values()} == {"meta"}
    frozen.load_state_dict(batch_norm().state_dict(), assign=True)
    assert {tensor.device.type for tensor in frozen.state_dict().values()} == {"cpu"}
    assert_close(frozen(images()), batch_norm()(images()))
    assert_same_state(frozen.to_batch_norm().state_dict(), batch_norm().state_dict())


def test_on_the_meta_device_it_becomes_real_by_to_empty_and_loading(affine: Affine) -> None:
    with torch.device("meta"):
        frozen = freeze(nn.BatchNorm2d(C), affine)
    frozen = frozen.to_empty(device="cpu")
    frozen.load_state_dict(batch_norm().state_dict())
    assert_close(frozen(images()), batch_norm()(images()))
    assert_same_state(frozen.to_batch_norm().state_dict(), batch_norm().state_dict())


# Hooks


def test_hooks_come_along_and_their_handles_still_remove_them(affine: Affine) -> None:
    bn, calls = batch_norm(), []
    handles = [
        bn.register_forward_hook(lambda module, args, output: calls.append("forward")),
        bn.register_forward_pre_hook(lambda module, args, kwargs: calls.append("pre"), with_kwargs=True),
        bn.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append("backward")),
        bn.register_state_dict_post_hook(lambda *args: calls.append("state dict")),
    ]
    order = ["pre", "forward", "backward", "state dict"]
    frozen = freeze(bn, affine)

    def use(module: nn.Module) -> list[str]:
        calls.clear()
        module(images().requires_grad_()).sum().backward()
        module.state_dict()
        return calls

    assert use(frozen) == order
    handles.append(frozen.register_forward_hook(lambda module, args, output: calls.append("late")))
    back = frozen.to_batch_norm()
    assert use(back) == ["pre", "forward", "late", "backward", "state dict"]
    for handle in handles:
        handle.remove()
    assert use(back) == []
    assert use(frozen) == []


@pytest.mark.parametrize("made_from", ["a BatchNorm", "nothing"])
def test_hooks_put_on_the_frozen_layer_go_along_on_the_way_back(affine: Affine, made_from: str) -> None:
    frozen = freeze(batch_norm(), affine) if made_from == "a BatchNorm" else FrozenBatchNorm2d(C, affine=affine)
    calls: list[str] = []
    frozen.register_forward_hook(lambda module, args, output: calls.append("forward"))
    frozen.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append("backward"))
    frozen.to_batch_norm()(images().requires_grad_()).sum().backward()
    assert calls == ["forward", "backward"]


def test_a_hook_that_changes_the_output_still_does(affine: Affine) -> None:
    bn, x = batch_norm(), images()
    bn.register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(freeze(bn, affine)(x), batch_norm()(x) + 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_torchscript_scripts_and_traces_it(affine: Affine, mode: bool) -> None:
    frozen, x = freeze(batch_norm(), affine).train(mode), images().requires_grad_()
    for module in (torch.jit.script(frozen), torch.jit.trace(frozen, x)):
        file = io.BytesIO()
        torch.jit.save(module, file)
        file.seek(0)
        assert torch.equal(torch.jit.load(file)(x), frozen(x))
