"""Re-estimating statistics: where the peers break and ours does not, and what their own tests ask, written anew.

Each test names a peer and its fault (or its test), shows that ours has not got it, then that the peer has. A peer that
is not installed, or has mended its fault, makes its test skip after ours has passed. Estimators of peers that cannot be
installed here (pycls, mmpretrain, robusta) are written down from their formulas.
"""

from __future__ import annotations

import contextlib
import copy
import socket
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import finetune_bn as fbn
from finetune_bn.errors import BadData, FinetuneBNError, NoBatchNormMatched
from tests.models import Plain, Tied, settle
from tests.tools import assert_same_state, untouched

IMAGES = 48


def net() -> Plain:
    torch.manual_seed(5)
    return settle(Plain()).eval()  # type: ignore[return-value]


def images(number: int = IMAGES) -> Tensor:
    return 2 * torch.randn(number, 3, 10, 10, generator=torch.Generator().manual_seed(3)) + 5


def population(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance of each channel in float64."""
    values = x.double().transpose(0, 1).reshape(x.shape[1], -1)
    return values.mean(1), values.var(1)


def assert_population(layer: Any, x: Tensor, rtol: float = 1e-5) -> None:
    mean, var = population(x)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=rtol, atol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=rtol, atol=0)


def fvcore(model: nn.Module, batches: Iterable[Any], number: int | None = None) -> None:
    """Run fvcore's PreciseBN, or skip where it is not installed."""
    precise_bn = pytest.importorskip("fvcore.nn.precise_bn")
    batches = list(batches)
    precise_bn.update_bn_stats(model, batches, len(batches) if number is None else number)


def peer(broken: bool, who: str) -> None:
    """Skip, with the words for it, where the peer does not break any more."""
    if not broken:
        pytest.skip(f"{who} does not break here any more")


def breaking(x: Tensor) -> Iterator[Tensor]:
    """Yield two batches, then fail as a loader does."""
    yield from x.split(16)[:2]
    raise OSError("the disk is gone")


def clusters(labels: int, of_each: int) -> Tensor:
    """Return images, label by label, that differ more between labels than within."""
    generator = torch.Generator().manual_seed(0)
    centers = 2 * torch.randn(labels, 3, 1, 1, generator=generator).repeat_interleave(of_each, 0)
    return centers + torch.randn(labels * of_each, 3, 4, 4, generator=generator)


# fvcore update_bn_stats


def test_fvcore_gives_a_layer_that_never_ran_variance_0() -> None:
    """fvcore: an estimator that was never updated is written all the same, mean 0 and variance 0."""

    class Idle(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.BatchNorm2d(4)

    torch.manual_seed(0)
    model = settle(Idle()).eval()
    before = copy.deepcopy(model.idle.state_dict())  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="no data reached idle"):
        record = fbn.recalibrate(model, images().split(16))
    assert ("idle", "was not reached by the data") in record.left_alone
    assert_same_state(model.idle.state_dict(), before)  # type: ignore[union-attr]
    fvcore(model.train(), images().split(16))
    peer(bool((model.idle.running_var == 0).all()), "update_bn_stats")  # type: ignore[union-attr]


def test_an_error_in_the_loader_leaves_fvcores_hooks_and_momentum_behind() -> None:
    """fvcore: nothing is restored when the loader or the model raises: momentum 1.0 and hooks stay."""
    model = net()
    with untouched(model), pytest.raises(OSError, match="the disk is gone"):
        fbn.recalibrate(model, breaking(images()))
    assert model.bn1.momentum == 0.1
    precise_bn = pytest.importorskip("fvcore.nn.precise_bn")
    with contextlib.suppress(OSError):
        precise_bn.update_bn_stats(model.train(), breaking(images()), 3)
    peer(model.bn1.momentum == 1.0 and len(model.bn1._forward_pre_hooks) == 1, "update_bn_stats")


def test_fvcore_replaces_the_buffers_that_others_hold() -> None:
    """fvcore: `bn.running_mean = ...`; EMA helpers, DDP and CUDA graphs go on with the old tensor (pytorch#63916)."""
    model = net()
    held = model.bn1.running_mean
    fbn.recalibrate(model, images().split(16))
    assert model.bn1.running_mean is held
    assert_population(model.bn1, model.conv1(images()).detach())
    fvcore(model.train(), images().split(16))
    peer(model.bn1.running_mean is not held, "update_bn_stats")


def test_fvcore_loses_a_small_variance_at_a_large_mean() -> None:
    """fvcore: E[x^2] - E[x]^2 in float32; at mean 1000 and sd 0.01 the variance is 0."""
    x = 1000 + 0.01 * torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    fbn.recalibrate(ours, x.split(16))
    assert_population(ours, x, rtol=1e-4)
    fvcore(theirs, x.split(16))
    peer(not torch.allclose(theirs.running_var.double(), population(x)[1], rtol=0.5), "update_bn_stats")


def test_fvcore_adds_up_in_the_dtype_of_the_buffers() -> None:
    """fvcore: buffers in bfloat16 are averaged in bfloat16; 64 batches lose what each adds."""
    x = (3 + torch.randn(256, 3, 4, 4, generator=torch.Generator().manual_seed(0))).bfloat16()
    ours, theirs = nn.BatchNorm2d(3).bfloat16(), nn.BatchNorm2d(3).bfloat16()
    fbn.recalibrate(ours, x.split(4))
    mean, var = population(x)
    nearest = mean.bfloat16(), var.bfloat16()
    assert torch.equal(ours.running_mean, nearest[0])
    assert torch.equal(ours.running_var, nearest[1])
    fvcore(theirs, x.split(4))
    peer(not torch.equal(theirs.running_var, nearest[1]), "update_bn_stats")


def test_fvcore_refuses_a_layer_that_is_called_twice() -> None:
    """fvcore: AssertionError "Some BN layers are reused"."""
    model = settle(Tied()).eval()
    x = torch.randn(16, 4, 6, 6)
    record = fbn.recalibrate(model, x.split(4))
    values = {row.names[0]: row.values for row in record.rows}
    assert values == {"first.bn": 2 * 16 * 36, "between": 16 * 36}
    precise_bn = pytest.importorskip("fvcore.nn.precise_bn")
    with pytest.raises(AssertionError, match="reused"):
        precise_bn.update_bn_stats(model.train(), x.split(4), 4)


def test_fvcore_passes_over_layers_in_eval_mode_and_frozen_ones_without_a_word() -> None:
    """fvcore: only layers with `training` set are measured; in a model in eval mode that is none, and no error."""
    model, frozen = net(), fbn.convert(net(), fbn.Freeze("none"))
    for each in (model, frozen):
        old = each.bn1.running_mean.clone()
        assert len(fbn.recalibrate(each, images().split(16)).rows) == 2
        assert not torch.allclose(each.bn1.running_mean, old, atol=0.1)
    theirs = net()
    with untouched(theirs):
        fvcore(theirs, images().split(16))


def test_peers_run_dropout_in_training_mode_while_they_measure() -> None:
    """fvcore and `update_bn` put the whole model in training mode: dropout scales what the layers behind it measure."""
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3)).eval()
    x = images()
    fbn.recalibrate(model, x.split(16))
    assert_population(model[1], x)
    update_bn(x.split(16), model)
    peer(not torch.allclose(model[1].running_var.double(), population(x)[1], rtol=0.5), "update_bn")
    fvcore(model.train(), x.split(16))
    peer(not torch.allclose(model[1].running_var.double(), population(x)[1], rtol=0.5), "update_bn_stats")


def test_fvcore_passes_the_labels_to_the_model_too() -> None:
    """fvcore: `model(inputs)` with whatever the loader yields, also (images, labels)."""
    model, x = net(), images(16)
    pairs = [(part, torch.zeros(len(part))) for part in x.split(8)]
    fbn.recalibrate(model, pairs)
    assert_population(model.bn1, model.conv1(x).detach())
    precise_bn = pytest.importorskip("fvcore.nn.precise_bn")
    with pytest.raises(TypeError):
        precise_bn.update_bn_stats(model.train(), pairs, 2)


@pytest.mark.gpu
def test_peers_leave_batches_where_they_are() -> None:
    """fvcore#97: no device handling; a loader yields batches on the CPU."""
    model = net().cuda()
    fbn.recalibrate(model, images().split(16))
    assert_population(model.bn1.cpu(), model.conv1.cpu()(images()).detach())


# torch.optim.swa_utils.update_bn


def test_update_bn_weighs_a_short_last_batch_as_much_as_a_full_one() -> None:
    """torch `update_bn`: momentum None averages batches, not images."""
    x = torch.cat([torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((1, 3, 4, 4), 9.0)])
    ours, theirs = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    fbn.recalibrate(ours, x.split(64))
    assert_population(ours, x)
    update_bn(x.split(64), theirs)
    peer(bool((theirs.running_mean > 4).all()), "update_bn")
    assert (ours.running_mean < 0.3).all()


@pytest.mark.parametrize(("p", "k"), [(8, 4), (4, 8), (2, 16)])
@pytest.mark.parametrize("mode", ["exact", "one_pass"])
def test_means_of_batch_variances_fall_short_on_p_x_k_batches(p: int, k: int, mode: Any) -> None:
    """torch `update_bn`, pycls `compute_precise_bn_stats`, mmpretrain: the variance of the batch means is dropped."""
    x = clusters(64, k)
    batches = x.split(p * k)
    ours, theirs = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    with pytest.warns(UserWarning, match="not i.i.d"):
        fbn.recalibrate(ours, batches, mode=mode, batch_size=p * k)
    assert_population(ours, x)
    mean_of_variances = torch.stack([population(part)[1] for part in batches]).mean(0)
    assert (mean_of_variances < 0.96 * ours.running_var).all()
    update_bn(batches, theirs)
    torch.testing.assert_close(theirs.running_var.double(), mean_of_variances, rtol=1e-4, atol=0)


def test_update_bn_measures_layers_in_eval_mode_and_changes_modes_and_counter() -> None:
    """torch `update_bn`: every BatchNorm is reset, and `model.train(was_training)` overwrites the mode of each part."""

    def mixed() -> Plain:
        model = net().train()
        model.bn1.eval()
        model.act.eval()
        return model

    model = mixed()
    modes = {name: module.training for name, module in model.named_modules()}
    before = copy.deepcopy(model.bn1.state_dict())
    fbn.recalibrate(model, images().split(16), layers="bn2")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert_same_state(model.bn1.state_dict(), before)
    assert model.bn2.num_batches_tracked == 7
    theirs = mixed()
    update_bn(images().split(16), theirs)
    moved = not torch.equal(theirs.bn1.running_mean, before["running_mean"])
    peer(moved and theirs.act.training and theirs.bn2.num_batches_tracked == 3, "update_bn")


def test_update_bn_cannot_read_a_dict() -> None:
    """torch `update_bn`: a batch that is a dict reaches the model as a dict."""
    model, x = net(), images(16)
    fbn.recalibrate(model, [{"image": part, "label": torch.zeros(8)} for part in x.split(8)])
    assert_population(model.bn1, model.conv1(x).detach())
    with pytest.raises(TypeError):
        update_bn([{"image": x}], model)


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3, 10, 10)]], ids=["none", "no images"])
def test_an_empty_loader_wipes_the_statistics_under_update_bn(batches: list[Tensor]) -> None:
    """torch `update_bn`: statistics are reset before there is anything to put in their place."""
    model = net()
    with untouched(model), pytest.raises(BadData, match="batch"):
        fbn.recalibrate(model, batches)
    with contextlib.suppress(ValueError, RuntimeError):
        update_bn(batches, model)
    peer(bool((model.bn1.running_mean == 0).all() and (model.bn1.running_var == 1).all()), "update_bn")


def test_an_error_leaves_update_bns_model_without_statistics_and_momentum() -> None:
    """torch `update_bn`: after an exception momentum is None, the mode training, the statistics of some batches."""
    model = net()
    with untouched(model), pytest.raises(OSError, match="the disk is gone"):
        fbn.recalibrate(model, breaking(images()), mode="one_pass", batch_size=4)
    with contextlib.suppress(OSError):
        update_bn(breaking(images()), model)
    peer(model.bn1.momentum is None and model.training, "update_bn")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_peers_write_nan_into_the_model(value: float) -> None:
    """torch `update_bn`, fvcore: one bad image makes all statistics NaN, silently."""
    model, x = net(), images()
    x[20, 0, 3, 3] = value
    with untouched(model), pytest.raises(FinetuneBNError, match=r"layer 'bn1', from batches 1\""):
        fbn.recalibrate(model, x.split(16))
    update_bn(x.split(16), model)
    peer(bool(model.bn2.running_mean.isnan().any()), "update_bn")


def test_nothing_is_recorded_for_backward() -> None:
    """pytorch#52055: older versions of `update_bn` built a graph of every batch."""
    model = net()
    seen: list[bool] = []
    model.conv2.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    for mode in ("exact", "one_pass"):
        fbn.recalibrate(model, images().split(16), mode=mode)  # type: ignore[arg-type]
    assert seen
    assert not any(seen)


# Distributed: fvcore, update_bn, pycls, mmpretrain, timm's distribute_bn


def _rank(rank: int, sizes: list[int], port: int, results: Any) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=len(sizes))
    mine = clusters(8, 4).split(sizes)[rank]
    ours, theirs = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    fbn.recalibrate(ours, mine.split(4))
    update_bn(mine.split(4), theirs)
    results[rank] = [t.tolist() for t in (ours.running_mean, ours.running_var, theirs.running_mean, theirs.running_var)]
    torch.distributed.destroy_process_group()


def test_peers_statistics_differ_from_process_to_process_or_are_averaged_as_if_all_had_seen_as_much() -> None:
    """fvcore#152, detectron2#5398, `update_bn`: each its own. pycls, mmpretrain, timm `distribute_bn`: plain means."""
    sizes = [24, 8]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(_rank, (sizes, port, results), nprocs=len(sizes))
    mean, var = (torch.tensor(values, dtype=torch.float64) for values in results[0][:2])
    assert results[0][:2] == results[1][:2]
    expected_mean, expected_var = population(clusters(8, 4))
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var, expected_var, rtol=1e-5, atol=0)
    peer(results[0][2:] != results[1][2:], "update_bn")
    averaged = torch.tensor([results[rank][2:] for rank in range(2)], dtype=torch.float64).mean(0)
    assert not torch.allclose(averaged[0], expected_mean, atol=0.1)
    assert (averaged[1] < 0.9 * expected_var).all()


# mmpretrain PreciseBNHook, robusta, tent


def test_mmpretrain_may_measure_no_batch_at_all() -> None:
    """mmpretrain: `num_samples // (batch size * world)` batches, which may be 0, and then zeros are written."""
    model, x = net(), images(16)
    record = fbn.recalibrate(model, x.split(16), max_samples=10)  # fewer than a batch: the batch is cut
    assert record.images == 10
    assert_population(model.bn1, model.conv1(x[:10]).detach())
    with untouched(model), pytest.raises(BadData, match=r"5 images.*at least min_samples=8"):
        fbn.recalibrate(model, x.split(16), max_samples=5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.BatchNorm1d(3), (32, 3)), (nn.BatchNorm1d(3), (32, 3, 5)), (nn.BatchNorm3d(3), (16, 3, 2, 3, 4))],
)
def test_robusta_and_tent_adapt_images_only(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """robusta, tent: `isinstance(m, nn.BatchNorm2d)`; batches of one, which BatchNorm1d refuses, are a special case."""
    x = 3 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for batch in (8, 1):
        model = copy.deepcopy(layer)
        fbn.recalibrate(model, x.split(batch))
        assert_population(model, x)


def test_robusta_and_tent_leave_another_model_behind() -> None:
    """robusta: wrappers with keys of their own, `requires_grad` off. tent: evaluation that depends on the batch."""
    model, x = net(), images()
    keys, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    fbn.recalibrate(model, x.split(16))
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
    torch.testing.assert_close(model(x[:1]), model(x)[:1])
    tent = copy.deepcopy(model)
    for layer in (tent.bn1, tent.bn2):
        layer.running_mean = layer.running_var = None
    peer(not torch.allclose(tent(x[:1]), tent(x)[:1], atol=1e-2), "a layer without running statistics")


@pytest.mark.parametrize("prior", [0.0, 16.0, 1024.0])
def test_robustas_mixture_of_source_and_target_lacks_what_lies_between_their_means(prior: float) -> None:
    """robusta `adapt_bayesian(prior)` (test/test_batchnorm.py): share N / (N + n) of mean and variance, and no more."""
    layer, x = settle(nn.BatchNorm2d(3)), images()
    source_mean, source_var = layer.running_mean.double(), layer.running_var.double()
    mean, var = population(x)
    share = prior / (prior + IMAGES)
    theirs = share * source_var + (1 - share) * var
    fbn.recalibrate(layer, x.split(16), prior=prior)
    expected = theirs + share * (1 - share) * (source_mean - mean) ** 2
    torch.testing.assert_close(layer.running_mean.double(), share * source_mean + (1 - share) * mean)
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=1e-5, atol=0)
    if prior:
        assert (theirs < 0.8 * expected).any()


@pytest.mark.parametrize("part", ["mean", "var"])
def test_one_of_mean_and_variance_adapts_alone(part: Any) -> None:
    """robusta test/test_batchnorm.py, `adapt_*`: the parts by themselves."""
    layer, x = settle(nn.BatchNorm2d(3)), images()
    before = copy.deepcopy(layer.state_dict())
    fbn.recalibrate(layer, x.split(16), part=part)
    other = {"mean": "running_var", "var": "running_mean"}[part]
    assert torch.equal(layer.state_dict()[other], before[other])
    expected = dict(zip(("mean", "var"), population(x), strict=True))[part]
    torch.testing.assert_close(layer.state_dict()[f"running_{part}"].double(), expected, rtol=1e-5, atol=1e-5)


# fvcore tests/test_precise_bn.py


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("mode", ["exact", "one_pass"])
def test_batches_of_any_size_give_the_statistics_of_the_whole(dimensions: int, mode: Any) -> None:
    """fvcore tests/test_precise_bn.py::test_precise_bn: 1d, 2d and 3d, the same images in batches of varying sizes."""
    kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    x = 1 + 3 * torch.randn(64, 3, *[4] * dimensions, generator=torch.Generator().manual_seed(0))
    for sizes in ([64], [16] * 4, [1] * 64, [5, 30, 1, 28]):
        layer = kind(3)
        fbn.recalibrate(layer, x.split(sizes), mode=mode)
        assert_population(layer, x)
    theirs = kind(3)
    fvcore(theirs, x.split([5, 30, 1, 28]))
    torch.testing.assert_close(theirs.running_var, layer.running_var, rtol=5e-3, atol=0)  # divided by n there


def test_too_little_data_is_an_error_and_the_model_is_as_it_was() -> None:
    """fvcore tests/test_precise_bn.py::test_precise_bn_insufficient_data: there the model keeps what it got so far."""
    model = net()
    with untouched(model), pytest.raises(BadData, match="min_samples=100"):
        fbn.recalibrate(model, images().split(16), min_samples=100)
    before = copy.deepcopy(model.bn1.state_dict())
    precise_bn = pytest.importorskip("fvcore.nn.precise_bn")
    with pytest.raises(AssertionError, match="dataloader stops"):
        precise_bn.update_bn_stats(model.train(), list(images().split(16)), 10)
    last = model.conv1(images()[-16:]).detach()
    half_done = torch.allclose(model.bn1.running_mean, last.mean((0, 2, 3)), atol=1e-4)
    peer(half_done and not torch.equal(model.bn1.running_mean, before["running_mean"]), "update_bn_stats")


# torch test/optim/test_swa_utils.py


@pytest.mark.parametrize("labels", [False, True], ids=["x", "(x, y)"])
def test_a_dense_and_a_convolutional_net_take_the_statistics_of_the_data(labels: bool) -> None:
    """torch test/optim/test_swa_utils.py::test_update_bn_dnn and test_update_bn_cnn; there to 0.1, here to 1e-5."""
    generator = torch.Generator().manual_seed(0)
    dense = nn.Sequential(nn.Linear(5, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 4))
    conv = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    for model, shape in ((dense, (64, 5)), (conv, (64, 3, 8, 8))):
        x = torch.rand(shape, generator=generator)
        loader: list[Any] = [(part, torch.zeros(len(part))) if labels else part for part in x.split(10)]
        fbn.recalibrate(model, loader)
        assert_population(model[1], model[0](x).detach())


def test_modes_and_momentum_come_back() -> None:
    """torch test/optim/test_swa_utils.py::test_bn_update_eval_momentum."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=0.3), nn.BatchNorm2d(5, momentum=None))
    for training in (False, True):
        model.train(training)
        fbn.recalibrate(model, images().split(16))
        assert [module.training for module in model.modules()] == [training] * 4
        assert [model[1].momentum, model[2].momentum] == [0.3, None]


# mmpretrain tests/test_engine/test_hooks/test_precise_bn_hook.py, pytorch-adapt tests/layers


def test_other_norm_layers_are_left_and_a_model_without_batch_norm_is_an_error() -> None:
    """mmpretrain ...::test_after_train_epoch, with BN, with GN, without: there a message in the log, here an error."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)).eval()
    before = copy.deepcopy(model[1].state_dict())
    assert [row.names for row in fbn.recalibrate(model, images().split(16)).rows] == [("2",)]
    assert_same_state(model[1].state_dict(), before)
    with pytest.raises(NoBatchNormMatched, match="a model with BatchNorm layers"):
        fbn.recalibrate(model[:2], images().split(16))


def test_merged_moments_are_numpys_moments_of_all_batches_together() -> None:
    """pytorch-adapt tests/layers/test_population_batch_norm.py: after many batches the statistics are those of all."""
    layer, x = nn.BatchNorm2d(3), images(200)
    fbn.recalibrate(layer, x.split([32] * 6 + [8]))
    values = np.moveaxis(x.double().numpy(), 1, 0).reshape(3, -1)
    np.testing.assert_allclose(layer.running_mean.numpy(), values.mean(1), rtol=1e-6)
    np.testing.assert_allclose(layer.running_var.numpy(), values.var(1, ddof=1), rtol=1e-6)
