"""Recalibration against layer-by-layer re-estimation in float64, however the data are cut, and when it fails."""

from __future__ import annotations

import copy
import random
import re
import socket
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.errors import BadData, FinetuneBNError, NoBatchNormMatched, UnsupportedLayer
from finetune_bn.layers.sites import find_batch_norms
from tests.models import Head1d, Plain, Tied, settle
from tests.references import layer_by_layer
from tests.tools import untouched

IMAGES = 48


def net() -> Plain:
    """The same network each time, in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return settle(Plain()).eval()  # type: ignore[return-value]


def images(n: int = IMAGES, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, 3, 10, 10, generator=generator) + 5


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items() if "running_" in name}


def distance(model: nn.Module, expected: dict[str, tuple[Any, Any]]) -> float:
    """Return the largest distance from (mean, var) of each layer: in sd, and of the variance relative."""
    worst = 0.0
    for name, (mean, var) in expected.items():
        layer = model.get_submodule(name)
        worst = max(worst, float(np.abs((layer.running_mean.double().numpy() - mean) / np.sqrt(var)).max()))
        worst = max(worst, float(np.abs(layer.running_var.double().numpy() / var - 1).max()))
    return worst


@pytest.mark.parametrize("cut", [1, 2, 7, 16, 48])
def test_exact_equals_layer_by_layer_re_estimation_however_the_data_are_cut(cut: int) -> None:
    model, x = net(), images()
    expected = layer_by_layer(model, x)
    record = fbn.recalibrate(model, x.split(cut), mode="exact")
    assert distance(model, expected) < 1e-5
    assert record.mode == "exact"
    assert record.images == IMAGES


def test_exact_does_not_depend_on_the_order_of_images() -> None:
    x = images()
    one, other = net(), net()
    fbn.recalibrate(one, x.split(7), mode="exact")
    fbn.recalibrate(other, x[torch.randperm(IMAGES)].split(5), mode="exact")
    for name, value in statistics(one).items():
        torch.testing.assert_close(value, statistics(other)[name], rtol=1e-5, atol=1e-5)


def test_exact_pools_batches_of_different_sizes_that_cannot_be_joined() -> None:
    model = net()
    batches = [images(8), nn.functional.interpolate(images(5, 1), 14), images(4, 2)]
    record = fbn.recalibrate(model, batches, mode="exact")
    assert record.images == 17
    inputs = torch.cat([model.conv1(b).flatten(2).transpose(0, 1).flatten(1) for b in batches], 1).double()
    torch.testing.assert_close(model.bn1.running_mean.double(), inputs.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.bn1.running_var.double(), inputs.var(1), rtol=1e-5, atol=1e-5)


def test_one_pass_on_one_chunk_is_exact_and_on_small_chunks_is_not() -> None:
    whole, small = net(), net()
    expected = layer_by_layer(net(), images())
    fbn.recalibrate(whole, images().split(4), mode="one_pass")  # joined to one chunk
    fbn.recalibrate(small, images().split(4), mode="one_pass", batch_size=2)
    assert distance(whole, expected) < 1e-3  # a chunk is normalized by its biased variance, evaluation is not
    assert distance(small, expected) > 5e-3
    torch.testing.assert_close(small.bn1.running_var, whole.bn1.running_var)  # the first layer's input is the same


def test_auto_takes_one_pass_where_the_activations_exceed_the_memory_and_says_so() -> None:
    model = net()
    record = fbn.recalibrate(model, images().split(4), memory=10_000)
    assert record.mode == "one_pass"
    assert "mode one_pass" in str(record)
    assert fbn.recalibrate(model, images().split(4)).mode == "exact"


@pytest.mark.parametrize("offset", [0.0, 10_000.0])
@pytest.mark.parametrize("mode", ["exact", "one_pass"])
def test_a_single_layer_equals_numpy_in_float64_also_at_mean_10000_and_sd_001(mode: Any, offset: float) -> None:
    layer = nn.BatchNorm2d(3)
    x = offset + 0.01 * torch.randn(64, 3, 4, 4)
    fbn.recalibrate(layer, x.split(3), mode=mode)
    values = x.double().transpose(0, 1).reshape(3, -1).numpy()
    np.testing.assert_allclose(layer.running_mean.numpy(), values.mean(1), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(layer.running_var.numpy(), values.var(1, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("affine", ["none", "shift", "merged", "original"])
def test_a_frozen_layer_renormalizes_to_what_a_live_one_recalibrated_and_frozen_computes(affine: Any) -> None:
    live, frozen = net(), fbn.convert(net(), fbn.Freeze(affine))
    fbn.recalibrate(live, images().split(8))
    fbn.recalibrate(frozen, images().split(8))
    torch.testing.assert_close(frozen(images()), live(images()), rtol=1e-4, atol=1e-4)
    reverted = fbn.revert(frozen)
    torch.testing.assert_close(statistics(reverted)["bn2.running_var"], statistics(live)["bn2.running_var"])


@pytest.mark.parametrize("affine", [None, "none", "shift", "merged", "original"])
def test_preserve_keeps_the_function_and_takes_the_statistics_of_the_data(affine: Any) -> None:
    model = net() if affine is None else fbn.convert(net(), fbn.Freeze(affine))
    before = model(images())
    inputs = model.conv2(model.act(model.bn1(model.conv1(images())))).double()
    record = fbn.recalibrate(model, images().split(5), how="preserve")
    torch.testing.assert_close(model(images()), before, rtol=1e-5, atol=1e-5)
    live = model if affine is None else fbn.revert(model)
    torch.testing.assert_close(live(images()), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(live.bn2.running_mean.double(), inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        live.bn2.running_var.double(), inputs.transpose(0, 1).flatten(1).var(1), rtol=1e-4, atol=0
    )
    assert record.mode == "exact"


def test_renormalizing_a_merged_layer_that_lost_its_statistics_is_refused_and_preserve_is_not() -> None:
    model = fbn.convert(net(), fbn.Freeze("merged"))
    reloaded = fbn.convert(net(), fbn.Freeze("merged"))
    reloaded.load_state_dict(model.state_dict())
    with untouched(reloaded), pytest.raises(UnsupportedLayer, match=r"bn1.*statistics from before .* are gone"):
        fbn.recalibrate(reloaded, images().split(8))
    before = reloaded(images())
    fbn.recalibrate(reloaded, images().split(8), how="preserve")
    torch.testing.assert_close(reloaded(images()), before, rtol=0, atol=0)
    assert fbn.revert(reloaded).bn1.running_mean.abs().max() > 0.1  # the statistics of the data, and not 0


@pytest.mark.parametrize("affine", ["none", "merged"])
def test_a_network_fine_tuned_frozen_gets_its_own_statistics_first_and_keeps_working(affine: Any) -> None:
    """Frozen layers work by the statistics of pretraining: where the target is the source, nothing may change."""
    source = images(64, 1).split(8)
    model = fbn.convert(net(), fbn.Freeze(affine))
    with torch.no_grad():  # fine-tuned: what arrives at the layers has little to do with the statistics they have
        model.conv1.weight.mul_(3)
    before = model(source[0])
    fbn.recalibrate(model, source, source=source)
    torch.testing.assert_close(model(source[0]), before, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        arrives = model.conv1(torch.cat(source)).mean((0, 2, 3))
    reverted = fbn.revert(model)
    torch.testing.assert_close(reverted.bn1.running_mean, arrives, rtol=1e-3, atol=1e-3)
    naive = fbn.convert(net(), fbn.Freeze(affine))
    with torch.no_grad():
        naive.conv1.weight.mul_(3)
    fbn.recalibrate(naive, source)
    assert (naive(source[0]) - before).abs().max() > 0.1


def test_where_the_second_step_fails_the_first_is_undone() -> None:
    model = fbn.convert(net(), fbn.Freeze())
    bad = [torch.full((8, 3, 10, 10), float("nan"))]
    with untouched(model), pytest.raises(FinetuneBNError, match="NaN"):
        fbn.recalibrate(model, bad, source=images().split(8))
    with untouched(model), pytest.raises(FinetuneBNError, match="source: got 'batches'"):
        fbn.recalibrate(model, images().split(8), source=images().split(8), how="preserve")
    with untouched(model), pytest.raises(FinetuneBNError, match="source: got 'int'"):
        fbn.recalibrate(model, images().split(8), source=3)


def test_mixing_with_the_source_follows_the_formula_with_the_between_means_term() -> None:
    layer = settle(nn.BatchNorm2d(3))
    mean, var = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    x = images(20)
    fbn.recalibrate(layer, x.split(6), prior=60)
    target = x.double().transpose(0, 1).reshape(3, -1).numpy()
    share = 60 / (60 + 20)
    between = share * (1 - share) * (mean - target.mean(1)) ** 2
    np.testing.assert_allclose(layer.running_mean, share * mean + (1 - share) * target.mean(1), rtol=1e-5)
    np.testing.assert_allclose(
        layer.running_var, share * var + (1 - share) * target.var(1, ddof=1) + between, rtol=1e-5
    )


def test_a_huge_prior_keeps_the_source_and_exact_mixes_the_same_for_any_cut() -> None:
    kept, model = net(), net()
    fbn.recalibrate(kept, images().split(6), prior=1e9)
    for name, value in statistics(model).items():
        torch.testing.assert_close(statistics(kept)[name], value, rtol=1e-4, atol=1e-4)
    one, other = net(), net()
    fbn.recalibrate(one, images().split(48), prior=30, mode="exact")
    fbn.recalibrate(other, images().split(5), prior=30, mode="exact")
    for name, value in statistics(one).items():
        torch.testing.assert_close(statistics(other)[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("part", "kept"), [("mean", "running_var"), ("var", "running_mean")])
def test_one_part_alone_can_be_recalibrated(part: Any, kept: str) -> None:
    model, source = net(), statistics(net())
    fbn.recalibrate(model, images().split(6), part=part)
    for name, value in statistics(model).items():
        assert torch.equal(value, source[name]) == name.endswith(kept)


def test_only_the_chosen_layers_measure_and_the_others_stay_in_eval_mode() -> None:
    model, source = net(), statistics(net())
    record = fbn.recalibrate(model, images().split(6), layers="bn2")
    assert torch.equal(model.bn1.running_mean, source["bn1.running_mean"])
    with torch.no_grad():
        inputs = model.conv2(model.act(model.bn1(model.conv1(images()))))
    torch.testing.assert_close(model.bn2.running_mean, inputs.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    assert record.left_alone == (("bn1", "was not chosen"),)
    with pytest.raises(NoBatchNormMatched, match="layers: got 'layer4"):
        fbn.recalibrate(model, images().split(6), layers=["bn1", "layer4.*"])


def test_a_shared_layer_merges_its_calls() -> None:
    model = settle(Tied()).eval()
    x = torch.randn(16, 4, 6, 6)
    arrived: list[Tensor] = []
    shared = model.first.bn
    handle = shared.register_forward_pre_hook(lambda module, args: arrived.append(args[0]))
    record = fbn.recalibrate(model, [x], mode="one_pass")
    handle.remove()
    values = torch.cat(arrived[-2:]).transpose(0, 1).flatten(1) if len(arrived) == 2 else None
    row = next(row for row in record.rows if len(row.names) == 2)
    assert row.values == 2 * 16 * 36
    if values is not None:
        torch.testing.assert_close(shared.running_mean, values.mean(1), rtol=1e-4, atol=1e-4)
    fbn.recalibrate(model, x.split(4), mode="exact")


def test_dropout_stays_in_eval_mode_and_modes_and_random_states_come_back() -> None:
    model = nn.Sequential(nn.Dropout(0.9), settle(nn.BatchNorm2d(3)))
    model[1].eval()
    python, numpy = random.getstate(), np.random.get_state()[1].copy()
    state = torch.get_rng_state()
    x = images()

    def draws() -> Iterator[Tensor]:
        for batch in x.split(8):
            random.random(), np.random.rand(), torch.rand(1)
            yield batch

    fbn.recalibrate(model, draws())
    torch.testing.assert_close(model[1].running_mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy)
    assert torch.equal(torch.get_rng_state(), state)


def test_buffers_are_filled_in_place_and_momentum_and_counter_stay() -> None:
    model = net()
    buffer, counter = model.bn2.running_mean, model.bn2.num_batches_tracked.clone()
    fbn.recalibrate(model, images().split(6))
    assert model.bn2.running_mean is buffer
    assert torch.equal(model.bn2.num_batches_tracked, counter)
    assert model.bn2.momentum == 0.01


@pytest.mark.parametrize(
    "pack",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, "names"],
        lambda x: {"x": x, "label": torch.zeros(len(x))},
        lambda x: {"image": x, "label": torch.zeros(len(x))},
        lambda x: ({"x": x}, torch.zeros(len(x))),
    ],
)
def test_batches_may_be_tensors_tuples_or_dicts(pack: Any) -> None:
    model, expected = net(), net()
    fbn.recalibrate(expected, images().split(6))
    fbn.recalibrate(model, [pack(batch) for batch in images().split(6)])
    assert_equal_statistics(model, expected)


def test_a_forward_of_ones_own_gets_the_whole_batch() -> None:
    model, expected = net(), net()
    fbn.recalibrate(expected, images().split(6))
    batches = [{"left": {"pixels": batch}, "id": torch.arange(len(batch))} for batch in images().split(6)]
    fbn.recalibrate(model, batches, forward=lambda m, batch: m(batch["left"]["pixels"]))
    assert_equal_statistics(model, expected)


def assert_equal_statistics(model: nn.Module, expected: nn.Module) -> None:
    for name, value in statistics(expected).items():
        assert torch.equal(statistics(model)[name], value), name


@pytest.mark.parametrize("mode", ["exact", "one_pass"])
def test_autocast_of_the_caller_is_used_and_statistics_stay_in_float32(mode: Any) -> None:
    model = net()
    seen = []
    handle = model.bn1.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fbn.recalibrate(model, images().split(8), mode=mode)
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert model.bn1.running_mean.dtype == torch.float32
    reference = net()
    fbn.recalibrate(reference, images().split(8), mode=mode)
    torch.testing.assert_close(model.bn1.running_var, reference.bn1.running_var, rtol=2e-2, atol=0)


def test_a_bfloat16_model_measures_in_float32() -> None:
    model = net().to(torch.bfloat16)
    record = fbn.recalibrate(model, images().to(torch.bfloat16).split(8))
    assert record.rows[0].mean_after.dtype == torch.float32
    assert model.bn1.running_var.dtype == torch.bfloat16


def test_a_batch_norm_on_vectors_and_one_as_root() -> None:
    model = settle(Head1d()).eval()
    probe = torch.randn(32, *_input_of(model))
    fbn.recalibrate(model, probe.split(5))
    root = nn.BatchNorm1d(4)
    x = torch.randn(64, 4) * 3 + 1
    fbn.recalibrate(root, x.split(9))
    torch.testing.assert_close(root.running_var, x.var(0))


def test_an_error_names_the_layers_and_the_one_that_has_no_name() -> None:
    root, x = nn.BatchNorm1d(4, track_running_stats=False), torch.randn(64, 4)
    nested = nn.Sequential(OrderedDict(head=root))
    for model, name in ((root, r"\(root\)"), (nested, "head")):
        with pytest.raises(NoBatchNormMatched, match=f"{name} has no running statistics"):
            fbn.recalibrate(model, x.split(9))
        with pytest.raises(NoBatchNormMatched, match=f"There are: {name}\\.$"):
            fbn.recalibrate(model, x.split(9), layers="layer*")


def test_an_error_names_four_layers_and_says_where_there_are_more() -> None:
    for layers, known in ((4, "0, 1, 2, 3"), (5, "0, 1, 2, 3, ...")):
        model = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(layers)))
        with pytest.raises(NoBatchNormMatched, match=rf"There are: {re.escape(known)}\.$"):
            fbn.recalibrate(model, [torch.randn(16, 4)], layers="layer*")


def _input_of(model: nn.Module) -> tuple[int, ...]:
    for shape in ((3, 10, 10), (6,), (4,), (3, 8, 8)):
        try:
            model(torch.randn(4, *shape))
        except RuntimeError:
            continue
        return shape
    raise AssertionError("no input fits")


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        ([], BadData, "batches: got 'no batch'"),
        ([torch.empty(0, 3, 10, 10)], BadData, r"batches\[0\]: got .*at least one image"),
        ([images(3)], BadData, "3 images.*min_samples=8"),
        ([{"pixels": 1}], BadData, r"batches\[0\]: got 'dict with the keys pixels'"),
        (7, FinetuneBNError, "batches: got 'int'"),
        ({"x": images()}, FinetuneBNError, "batches: got 'dict with the keys x'.*pass \\[batch\\]"),
    ],
)
def test_batches_that_are_none_are_one_clear_error(batches: Any, error: type[Exception], match: str) -> None:
    model = net()
    with untouched(model), pytest.raises(error, match=match):
        fbn.recalibrate(model, batches)


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "fast"},
        {"how": "keep"},
        {"part": "median"},
        {"prior": -1},
        {"prior": float("nan")},
        {"tolerance": 0},
        {"max_samples": 0},
        {"batch_size": -3},
        {"min_samples": 0},
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any]) -> None:
    model = net()
    with untouched(model), pytest.raises(FinetuneBNError, match=f"^{next(iter(arguments))}: got"):
        fbn.recalibrate(model, images().split(8), **arguments)


@pytest.mark.parametrize("mode", ["exact", "one_pass"])
@pytest.mark.parametrize("how", ["renormalize", "preserve"])
def test_an_exception_in_the_third_batch_leaves_everything_bit_for_bit(mode: Any, how: Any) -> None:
    model = net().train()
    model.bn2.eval()
    model.bn1.register_forward_hook(lambda module, args, output: None)
    seen = []

    def forward(module: nn.Module, batch: Tensor) -> Tensor:
        seen.append(len(batch))
        if bool((batch == 77.0).any()):
            raise RuntimeError("the third")
        torch.rand(3)
        return module(batch)

    batches = list(images().split(16))
    batches[2] = batches[2].clone()
    batches[2][0, 0, 0, 0] = 77.0
    with untouched(model), pytest.raises(RuntimeError, match="the third"):
        fbn.recalibrate(model, batches, mode=mode, how=how, batch_size=16, forward=forward)
    assert seen

    def broken() -> Iterator[Tensor]:
        yield from batches[:2]
        raise OSError("disk gone")

    with untouched(model), pytest.raises(OSError, match="disk gone"):
        fbn.recalibrate(model, broken(), mode=mode, how=how)


@pytest.mark.parametrize("mode", ["exact", "one_pass"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_an_error_that_names_layer_and_batch(mode: Any, value: float) -> None:
    model = net()
    batches = [b.clone() for b in images().split(8)]
    batches[4][1, 0, 3, 3] = value
    with untouched(model), pytest.raises(FinetuneBNError, match=r"layer 'bn1', from batches .*4"):
        fbn.recalibrate(model, batches, mode=mode, batch_size=8)


def test_a_layer_that_never_ran_is_left_as_it_was_and_named() -> None:
    model = net()
    model.unused = settle(nn.BatchNorm2d(4))
    before = model.unused.running_var.clone()
    with pytest.warns(UserWarning, match="no data reached unused"):
        record = fbn.recalibrate(model, images().split(8))
    assert torch.equal(model.unused.running_var, before)
    assert ("unused", "was not reached by the data") in record.left_alone
    assert "left alone: unused" in str(record)


def test_a_model_without_batch_norm_and_one_without_statistics_are_errors() -> None:
    with pytest.raises(NoBatchNormMatched, match="a model with BatchNorm layers"):
        fbn.recalibrate(nn.Linear(3, 3), [torch.randn(9, 3)])
    with pytest.raises(NoBatchNormMatched, match="has no running statistics"):
        fbn.recalibrate(nn.BatchNorm1d(3, track_running_stats=False), [torch.randn(9, 3)])


def test_statistics_that_float16_cannot_hold_are_an_error() -> None:
    layer = nn.BatchNorm1d(2).half()
    x = torch.tensor([[-1000.0, 0.0], [1000.0, 1.0]]).repeat(8, 1).half()
    with untouched(layer), pytest.raises(FinetuneBNError, match=r"running_var .* torch.float16 holds"):
        fbn.recalibrate(layer, [x])


def test_a_model_whose_batches_take_different_paths_needs_one_pass() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.shape[2] == 10 else self.b(x)

    model = Forked().eval()
    batches = [images(8), nn.functional.interpolate(images(8), 6)]
    with untouched(model), pytest.raises(FinetuneBNError, match="same order for every batch"):
        fbn.recalibrate(model, batches, mode="exact")
    with pytest.warns(UserWarning, match="different paths"):
        record = fbn.recalibrate(model, batches)
    assert record.mode == "one_pass"
    torch.testing.assert_close(model.a.running_mean, images(8).mean((0, 2, 3)), rtol=1e-5, atol=1e-5)


def sorted_by_class(n: int = 96) -> Tensor:
    return images(n) + 3 * torch.arange(12).repeat_interleave(n // 12)[:, None, None, None]


def test_a_class_sorted_loader_is_warned_of_and_a_shuffled_one_is_not() -> None:
    x = sorted_by_class()
    with pytest.warns(UserWarning, match=r"not i\.i\.d\. \(permutation test: p = 0\.000"):
        fbn.recalibrate(net(), x.split(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fbn.recalibrate(net(), x[torch.randperm(len(x))].split(8))


@pytest.mark.parametrize("mode", ["exact", "one_pass"])
@pytest.mark.parametrize("between", [0.3, 1.0])
def test_the_stop_rule_takes_the_samples_that_theory_predicts(mode: Any, between: float) -> None:
    """Standard error of the mean: sqrt(between-image share / n), of the log variance sqrt(2 share^2 / n + ...)."""
    generator = torch.Generator().manual_seed(0)
    positions, tolerance = 64, 0.05
    image = torch.randn(4000, 256, 1, generator=generator) * between**0.5
    x = image + torch.randn(4000, 256, positions, generator=generator) * (1 - between) ** 0.5
    x = x if between < 1 else x[:, :, 0]
    share = between + (1 - between) / positions
    theory = max(share, 2 * share**2 + 2 * (1 - between) ** 2 / positions + 4 * between * (1 - between) / positions)
    layer = nn.BatchNorm1d(256)
    record = fbn.recalibrate(layer, x.split(16), tolerance=tolerance, mode=mode)
    assert record.images == pytest.approx(theory / tolerance**2, rel=0.2)
    assert record.standard_error <= tolerance


def test_a_tolerance_that_the_data_cannot_reach_is_said() -> None:
    with pytest.warns(UserWarning, match=r"standard error is .* and not 1e-05: there were only 48 images"):
        record = fbn.recalibrate(net(), images().split(8), tolerance=1e-5)
    assert record.images == IMAGES


def test_no_more_images_are_taken_than_asked_for() -> None:
    taken = []

    def batches() -> Iterator[Tensor]:
        for batch in images().split(8):
            taken.append(len(batch))
            yield batch

    record = fbn.recalibrate(net(), batches(), max_samples=20)
    assert record.images == 20
    assert sum(taken) == 24


def test_the_record_tells_what_moved() -> None:
    model = net()
    before = model.bn1.running_mean.clone()
    record = fbn.recalibrate(model, images().split(8))
    row = record.rows[0]
    assert row.names == ("bn1",)
    assert torch.equal(row.mean_before, before)
    assert torch.equal(row.mean_after, model.bn1.running_mean)
    assert row.values == IMAGES * 64
    assert 0 < row.standard_error < 1
    assert record.to_dict()["rows"][1]["names"] == ["bn2"]


def test_timms_norm_act_layers_measure_in_front_of_their_activation() -> None:
    timm = pytest.importorskip("timm")
    model = settle(timm.create_model("test_efficientnet", num_classes=3)).eval()
    x = torch.randn(24, 3, 32, 32)
    expected = layer_by_layer(model, x)
    fbn.recalibrate(model, x.split(5), mode="exact")
    assert distance(model, expected) < 1e-3


# Sizes of the batches of each rank: one process alone, two of which one is empty, and three.
UNEVEN = [[[16, 16, 16]], [[30, 17, 1], []], [[5, 1], [40], [2]]]


def run_rank(rank: int, address: str, queue: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=3)
    groups = [torch.distributed.new_group(list(range(len(sizes)))) for sizes in UNEVEN]
    queue.put((rank, [run_group(rank, *pair) for pair in zip(UNEVEN, groups, strict=True) if rank < len(pair[0])]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_group(rank: int, sizes: list[list[int]], group: Any) -> dict[str, Any]:
    starts = np.cumsum([0, *(sum(part) for part in sizes)])
    own = images()[starts[rank] : starts[rank + 1]]
    batches = own.split(sizes[rank]) if sizes[rank] else []
    found: dict[str, Any] = {}
    for mode in ("exact", "one_pass"):
        model = net()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record = fbn.recalibrate(model, batches, mode=mode, group=group)  # type: ignore[arg-type]
        found[mode] = ({name: value.numpy() for name, value in statistics(model).items()}, record.images)
    model = net()
    try:
        fbn.recalibrate(model, batches if rank else [torch.full((1, 3, 10, 10), float("nan"))], group=group)
        found["error"] = ""
    except FinetuneBNError as error:
        found["error"] = str(error)
    found["unchanged"] = all(torch.equal(value, statistics(net())[name]) for name, value in statistics(model).items())
    return found


def test_any_number_of_processes_with_uneven_data_gives_the_same() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=run_rank, args=(rank, address, queue)) for rank in range(3)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=300) for _ in processes)
    for process in processes:
        process.join(60)
    expected = layer_by_layer(net(), images())
    assert [len(found[rank]) for rank in range(3)] == [3, 2, 1]
    for rank in range(3):
        for own, first in zip(found[rank], found[0][rank:], strict=True):
            exact, count = own["exact"]
            assert count == IMAGES
            for name, (mean, var) in expected.items():
                np.testing.assert_allclose(exact[f"{name}.running_mean"], mean, atol=1e-5)
                np.testing.assert_allclose(exact[f"{name}.running_var"], var, rtol=1e-5)
            for name, value in own["one_pass"][0].items():
                np.testing.assert_array_equal(value, first["one_pass"][0][name])
            assert own["error"]
            assert own["unchanged"]


def test_a_deep_copy_of_a_recalibrated_model_shares_nothing_with_the_run() -> None:
    model = net()
    fbn.recalibrate(model, images().split(8))
    twin = copy.deepcopy(model)
    assert all("forward" not in vars(site.module) for site in find_batch_norms(twin))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("layers", 3),
        ("layers", [1]),
        ("forward", 3),
        ("mask", "lengths"),
        ("max_samples", 2.5),
        ("min_samples", "8"),
        ("batch_size", 2.5),
        ("memory", 1.5),
        ("prior", "16"),
        ("keep_batches", "yes"),
        ("source", 5),
    ],
)
def test_an_argument_of_a_wrong_type_is_one_error_that_names_it_and_changes_nothing(argument: str, value: Any) -> None:
    model = net()
    with untouched(model), pytest.raises(FinetuneBNError, match=rf"^{argument}: got .*; allowed: "):
        fbn.recalibrate(model, images().split(8), **{argument: value})


def test_numbers_of_numpy_are_numbers() -> None:
    record = fbn.recalibrate(net(), images().split(8), max_samples=np.int64(24), min_samples=np.int32(4))
    assert record.images == 24
