"""What a look finds in one layer: against numpy, against simulation, and for every kind of layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.diagnosis.inspector import Inspector, LayerInput, LayerLook, layer_inputs
from finetune_bn.layers import BatchRenorm2d, FrozenBatchNorm2d, GhostBatchNorm2d, NoisyFrozenBatchNorm2d
from finetune_bn.layers.hold_affine import hold_affine
from finetune_bn.layers.sites import BatchNormSite, find_batch_norms
from tests.models import Plain, Tied, settle


def site_of(layer: nn.Module) -> BatchNormSite:
    return BatchNormSite(("bn",), type(layer).__name__, layer.num_features, layer)  # type: ignore[arg-type]


def seen_by(layer: nn.Module, x: Tensor) -> LayerInput:
    (found,), _ = layer_inputs([site_of(layer)], len(x), lambda: layer.eval()(x))
    assert found is not None
    return found


def look(layer: nn.Module, x: Tensor, training: bool = True, inspector: Inspector | None = None) -> LayerLook:
    return (inspector or Inspector()).judge(site_of(layer), seen_by(layer, x), None, training)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 7), (5, 3, 8, 9), (5, 3, 2, 3, 4)])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_what_arrives_equals_numpy(shape: tuple[int, ...], offset: float) -> None:
    x = torch.randn(shape) * 2 + offset
    found = seen_by(nn.BatchNorm1d(3) if len(shape) < 4 else [nn.BatchNorm2d, nn.BatchNorm3d][len(shape) - 4](3), x)
    values = x.double().numpy().reshape(*shape[:2], -1)
    np.testing.assert_allclose(found.means.numpy(), values.mean(2), atol=1e-4)
    np.testing.assert_allclose(found.within.numpy(), values.var(2).mean(0), rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(found.variance.numpy(), values.var((0, 2)), rtol=1e-3)
    assert found.positions == values.shape[2]


def test_memory_format_and_half_precision_change_nothing_but_rounding() -> None:
    x = torch.randn(4, 3, 6, 6)
    expected = seen_by(nn.BatchNorm2d(3), x)
    for same in (x.to(memory_format=torch.channels_last), x.double()):
        found = seen_by(nn.BatchNorm2d(3).to(same.dtype), same)
        torch.testing.assert_close(found.means, expected.means, rtol=1e-5, atol=1e-6)
    half = seen_by(nn.BatchNorm2d(3), x.bfloat16())
    torch.testing.assert_close(half.means, expected.means, rtol=1e-2, atol=1e-2)


def test_every_called_layer_is_seen_once_and_the_others_are_not() -> None:
    model = settle(Tied()).eval()
    model.idle = nn.BatchNorm2d(4)
    sites = find_batch_norms(model)
    x = torch.randn(3, 4, 5, 5)
    inputs, output = layer_inputs(sites, 3, lambda: model(x))
    assert [found is not None for found in inputs] == [site.names != ("idle",) for site in sites]
    assert torch.equal(output, model(x))
    first = model.first.conv(x).mean((2, 3))  # the shared layer is called twice; its first call counts
    assert inputs[0] is not None
    torch.testing.assert_close(inputs[0].means.float(), first, rtol=1e-4, atol=1e-5)


def test_a_layer_that_does_not_get_a_row_an_image_is_not_seen_and_an_error_leaves_no_hook() -> None:
    layer = nn.BatchNorm2d(3).eval()
    assert layer_inputs([site_of(layer)], 4, lambda: layer(torch.randn(8, 3, 2, 2)))[0] == [None]
    with pytest.raises(ZeroDivisionError):
        layer_inputs([site_of(layer)], 4, lambda: 1 / 0)
    assert not layer._forward_pre_hooks


def test_drift_is_what_numpy_says() -> None:
    layer, x = settle(nn.BatchNorm2d(3)), torch.randn(12, 3, 4, 4) + torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1)
    found = look(layer, x)
    mean, var = layer.running_mean.numpy(), layer.running_var.numpy()  # type: ignore[union-attr]
    values = x.double().numpy()
    d = values.mean((0, 2, 3)) - mean
    assert found.drift == pytest.approx(np.sqrt(np.mean(d**2 / (var + 1e-5))), rel=1e-5)
    assert found.log_var_ratio == pytest.approx(np.log((values.var((0, 2, 3)) + 1e-5) / (var + 1e-5)).mean(), rel=1e-5)
    error = np.sqrt(values.mean((2, 3)).var(0, ddof=1) / 12)
    assert found.drift_z == pytest.approx(np.median(abs(d) / error) / 0.6745, rel=1e-4)


def test_where_nothing_has_drifted_z_is_about_one_and_a_shift_shows_in_units_of_the_standard_deviation() -> None:
    layer = nn.BatchNorm2d(500)  # the statistics of a new layer are those of the images
    x = torch.randn(32, 500, 3, 3)
    still, shifted = look(layer, x), look(layer, 2 * x + 3)
    assert still.drift_z == pytest.approx(1.0, abs=0.12)
    assert still.drift is not None
    assert still.drift < 0.1
    assert shifted.drift == pytest.approx(3.0, rel=0.02)
    assert shifted.log_var_ratio == pytest.approx(np.log(4), rel=0.02)


@pytest.mark.parametrize("affine", ["none", "shift", "merged", "original"])
def test_frozen_layers_drift_from_the_statistics_they_were_made_with(affine: Any) -> None:
    bn, x = settle(nn.BatchNorm2d(3)), torch.randn(6, 3, 4, 4)
    frozen = FrozenBatchNorm2d.from_batch_norm(bn, affine)  # type: ignore[arg-type]
    expected, found = look(bn, x), look(frozen, x, training=False)
    assert found.drift == pytest.approx(expected.drift)
    assert not found.by_batch
    assert not found.tracks


def test_without_statistics_to_compare_with_there_is_no_drift() -> None:
    loaded = FrozenBatchNorm2d(3, affine="merged")
    loaded._source = ()
    for layer in (loaded, nn.BatchNorm2d(3, track_running_stats=False)):
        found = look(layer, torch.randn(4, 3, 5, 5))
        assert found.drift is found.drift_z is found.log_var_ratio is None
        assert found.channels == 3


def test_one_image_has_a_drift_and_no_error_of_it() -> None:
    found = look(nn.BatchNorm2d(3), torch.randn(1, 3, 4, 4))
    assert found.drift is not None
    assert found.drift_z is None


def kinds() -> dict[str, tuple[nn.Module, bool, bool]]:
    """Layers, whether they normalize by the whole batch, and whether their running statistics follow it."""
    held = nn.BatchNorm2d(3)
    hold_affine(held, reset=False)
    ghost = GhostBatchNorm2d(3, groups=2)
    return {
        "live": (nn.BatchNorm2d(3), True, True),
        "affine held": (held, True, True),
        "statistics stay": (nn.BatchNorm2d(3, momentum=0.0), True, False),
        "no statistics": (nn.BatchNorm2d(3, track_running_stats=False), True, False),
        "cumulative": (nn.BatchNorm2d(3, momentum=None), True, True),
        "ghost": (ghost, False, True),
        "renorm": (BatchRenorm2d(3), False, True),
        "frozen": (FrozenBatchNorm2d(3), False, False),
        "noisy": (NoisyFrozenBatchNorm2d(3), False, False),
    }


@pytest.mark.parametrize("kind", list(kinds()))
def test_what_a_layer_does_with_a_batch_is_known(kind: str) -> None:
    layer, by_batch, tracks = kinds()[kind]
    found = look(layer, torch.randn(4, 3, 5, 5))
    assert (found.by_batch, found.tracks) == (by_batch, tracks)


def test_a_layer_in_eval_mode_while_training_is_no_live_one() -> None:
    found = look(nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5), training=False)
    assert not found.by_batch
    assert not found.tracks
    without = look(nn.BatchNorm2d(3, track_running_stats=False), torch.randn(4, 3, 5, 5), training=False)
    assert without.by_batch  # it has nothing else to go by


def test_layers_that_are_synchronized_normalize_the_images_of_all_processes() -> None:
    inspector = Inspector(world_size=4)
    seen = seen_by(nn.BatchNorm2d(3), torch.randn(6, 3, 4, 4))
    assert inspector.judge(site_of(nn.SyncBatchNorm(3)), seen, None, True).images == 24
    assert inspector.judge(site_of(nn.BatchNorm2d(3)), seen, None, True).images == 6


@pytest.mark.parametrize(("p", "k", "rho"), [(8, 4, 0.3), (4, 8, 0.5), (16, 2, 0.4), (32, 1, 0.3)])
def test_deff_n_eff_and_bias_of_a_layer_are_those_of_the_population(p: int, k: int, rho: float) -> None:
    channels, positions, inspector = 400, 4, Inspector()
    layer = nn.BatchNorm1d(channels)
    scale = torch.logspace(-1, 2, channels).view(1, -1, 1)  # channels of any scale count alike

    def draw() -> Tensor:
        label = torch.randn(p, channels, 1).repeat_interleave(k, 0) * rho**0.5
        image = torch.randn(p * k, channels, 1) * (1 - rho) ** 0.5
        return (label + image + torch.randn(p * k, channels, positions)) * scale

    for number in range(12):
        labels = torch.arange(p).repeat_interleave(k) + p * number
        inspector.counts.add(labels)
        found = inspector.judge(site_of(layer), seen_by(layer, draw()), labels, True)
    of_means, n = 1 + 1 / positions, p * k * positions
    expected_rho = rho / of_means if k > 1 else None
    deff = 1 + (k - 1) * rho / of_means
    bias = n / (n - 1) * (2 - of_means * deff / (p * k)) / 2 - 1
    if expected_rho is None:
        assert found.rho is found.deff is found.n_eff is None  # labels cannot be told from images
        return
    assert found.rho == pytest.approx(expected_rho, rel=0.05)
    assert found.deff == pytest.approx(deff, rel=0.03)
    assert found.n_eff == pytest.approx(p * k / deff, rel=0.03)
    assert found.running_var_bias == pytest.approx(bias, abs=0.003)


def test_few_batches_do_not_tell_how_labels_are_drawn() -> None:
    inspector, layer, labels = Inspector(), nn.BatchNorm2d(3), torch.tensor([0, 0, 1, 1])
    inspector.counts.add(labels)
    found = inspector.judge(site_of(layer), seen_by(layer, torch.randn(4, 3, 5, 5)), labels, True)
    assert found.deff is found.n_eff is None


def test_channels_die_once_they_are_without_variance_twice_in_a_row() -> None:
    layer, inspector = nn.BatchNorm2d(4), Inspector()
    assert layer.running_var is not None
    layer.running_var[3] = 0.0  # dead from the beginning, as some of every pretrained network are
    inspector.begin([site_of(layer)])
    x = torch.randn(4, 4, 5, 5)
    x[:, 3] = 7.0
    found = look(layer, x, inspector=inspector)
    assert (found.dead, found.died) == (1, 0)
    x[:, :2] = 0.0
    found = look(layer, x, inspector=inspector)
    assert (found.dead, found.died) == (3, 0)
    x[:, 1] = torch.randn(4, 5, 5)
    found = look(layer, x, inspector=inspector)
    assert (found.dead, found.died) == (2, 1)


def test_a_layer_without_any_variance_is_dead_and_nothing_else_is_said_of_it() -> None:
    found = look(nn.BatchNorm2d(3), torch.ones(4, 3, 5, 5))
    assert found.dead == 3
    assert found.drift is found.log_var_ratio is found.deff is None


def test_infinite_activations_are_counted_and_break_nothing() -> None:
    inspector, layer = Inspector(), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    x[0, 0, 0, 0] = torch.inf
    for number in range(9):
        labels = torch.tensor([0, 0, 1, 1]) + 2 * number
        inspector.counts.add(labels)
        found = inspector.judge(site_of(layer), seen_by(layer, x), labels, True)
    assert (found.not_finite, found.dead) == (1, 0)
    assert found.drift is not None
    assert np.isfinite(found.drift)


def test_a_network_is_looked_at_layer_by_layer() -> None:
    model = fbn.convert(settle(Plain()), fbn.Rules([("bn1", fbn.Freeze()), ("bn2", fbn.Keep())])).eval()
    sites = find_batch_norms(model)
    inputs, _ = layer_inputs(sites, 4, lambda: model(torch.randn(4, 3, 9, 9)))
    found = [Inspector().judge(site, seen, None, True) for site, seen in zip(sites, inputs, strict=True) if seen]
    assert [(layer.name, layer.by_batch) for layer in found] == [("bn1", False), ("bn2", True)]
