"""What layers measure while a model runs, against float64 numpy, in each of the ways to run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finetune_bn.errors import FinetuneBNError
from finetune_bn.functional.moments import Moments
from finetune_bn.layers.statistics import Statistics, statistics_of
from finetune_bn.recalibration import collector as collecting
from finetune_bn.recalibration import measured_layer
from finetune_bn.recalibration.collector import PIECE, Collector
from finetune_bn.recalibration.measured_layer import MeasuredLayer
from finetune_bn.utilities.batches import Chunk, Feeder, join
from finetune_bn.utilities.processes import Ranks
from tests.models import Plain, Tied, settle
from tests.references import as_array, layer_by_layer
from tests.tools import untouched


def net() -> Plain:
    torch.manual_seed(0)
    return settle(Plain()).eval()  # type: ignore[return-value]


def images(number: int, size: int = 10) -> Tensor:
    return 2 * torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1)) + 3


def chunks(x: Tensor, *sizes: int) -> list[Chunk]:
    feeder = Feeder(nn.Identity(), None, None)
    return [feeder.chunk(part, number) for number, part in enumerate(x.split(list(sizes)))]


def collector(model: nn.Module, names: tuple[str, ...] = ("bn1", "bn2"), preserve: bool = False) -> Collector:
    feeder = Feeder(model, None, None)
    layers = [MeasuredLayer(name, m, statistics_of(m)) for name, m in ((n, model.get_submodule(n)) for n in names)]

    def settle_on(number: int, moments: Moments) -> Statistics:
        return layers[number].before.moved_to(moments.mean, moments.var(correction=1), preserve=preserve)

    return Collector(layers, feeder, Ranks(None, feeder.device), settle_on, preserve)


def check(layer: MeasuredLayer, values: list[np.ndarray[Any, Any]], rtol: float = 1e-5) -> None:
    """Assert that a layer has measured these inputs, [N, C, ...] each."""
    flat = np.concatenate([np.moveaxis(v, 1, 0).reshape(v.shape[1], -1) for v in values], 1)
    assert layer.moments.count == flat.shape[1]
    np.testing.assert_allclose(layer.moments.mean.numpy(), flat.mean(1), rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(layer.moments.var().numpy(), flat.var(1), rtol=rtol)


def arriving(model: Plain, x: Tensor, normalize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return what arrives at bn1 and bn2, where bn1 computes `normalize`."""
    with torch.no_grad():
        first = model.conv1(x)
        return first, model.conv2(normalize(first).relu())


@pytest.mark.parametrize("as_kernel", [True, False])
def test_one_by_one_each_chunk_is_normalized_by_itself(as_kernel: bool) -> None:
    model, x = net(), images(9)
    found = collector(model)
    with untouched(model):
        for chunk in chunks(x, 4, 2, 3):
            found.one_by_one([chunk], as_kernel=as_kernel)
    live = nn.BatchNorm2d(6)
    live.load_state_dict(model.bn1.state_dict())
    arrived = [arriving(model, part, live) for part in x.split([4, 2, 3])]
    check(found.layers[0], [as_array(first) for first, _ in arrived])
    check(found.layers[1], [as_array(second) for _, second in arrived], rtol=0.02)  # by n or by n - 1
    assert found.order == [0, 1]


def test_together_all_chunks_are_normalized_by_what_they_have_in_common() -> None:
    model, x = net(), images(9)
    expected = layer_by_layer(model, x)
    found = collector(model)
    done: list[int] = []
    with untouched(model):
        found.together(chunks(x, 1, 5, 3), done.append)
    assert done == [1, 2]
    for layer in found.layers:
        mean, var = expected[layer.name]
        np.testing.assert_allclose(layer.moments.mean.numpy(), mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.moments.var(correction=1).numpy(), var, rtol=1e-4)


def test_preserving_the_layers_compute_what_they_computed() -> None:
    model, x = net(), images(9)
    found = collector(model, preserve=True)
    with untouched(model):
        for chunk in chunks(x, 4, 5):
            found.one_by_one([chunk], as_kernel=True)
    first, second = arriving(model, x, model.bn1)
    check(found.layers[0], [as_array(first)])
    check(found.layers[1], [as_array(second)])


@pytest.mark.parametrize("size", [8, 4], ids=["long rows", "short rows"])
def test_a_large_chunk_in_pieces_gives_what_it_gives_whole(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(2 * PIECE + 5, size)
    results = []
    for piece in (PIECE, len(x)):
        monkeypatch.setattr(collecting, "PIECE", piece)
        calls: list[int] = []
        model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
        settle(model).eval()
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -1, 1, generator=torch.Generator().manual_seed(parameter.numel()))
        model.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(len(args[0])))
        found = collector(model, ("1", "4"))
        found.one_by_one(chunks(x, len(x)), as_kernel=False)
        results.append((calls, [layer.moments for layer in found.layers], [layer.spread for layer in found.layers]))
    (pieces, moments, spread), (whole, expected, expected_spread) = results
    assert pieces == [PIECE, PIECE, 5]
    assert whole == [len(x)]
    for one, other in zip(moments, expected, strict=True):
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.var(), other.var(), rtol=1e-5, atol=0)
    for ours, theirs, pooled in zip(spread, expected_spread, expected, strict=True):
        assert ours.count == theirs.count
        a, b = (s.variance_per_image(pooled.mean, pooled.var()) for s in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_where_pieces_take_different_paths_the_whole_chunk_goes_and_counts_once() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.a(x) if len(x) > 10 else self.b(x)

    model, x = Forked().eval(), images(PIECE + 5, 6)
    found = collector(model, ("first", "a", "b"))
    with untouched(model):
        found.one_by_one(chunks(x, len(x)), as_kernel=False)
    assert [float(layer.moments.count) for layer in found.layers] == [len(x) * 36, len(x) * 36, 0]
    check(found.layers[0], [as_array(x)])


def test_a_shared_layer_measures_all_its_calls() -> None:
    model = settle(Tied()).eval()
    found = collector(model, ("first.bn", "between"))
    found.one_by_one(chunks(torch.randn(4, 4, 6, 6), 4), as_kernel=True)
    assert [float(layer.moments.count) for layer in found.layers] == [2 * 4 * 36, 4 * 36]


@pytest.mark.parametrize(
    "number", [1, measured_layer._MERGE_AT - 1, measured_layer._MERGE_AT, 2 * measured_layer._MERGE_AT + 3]
)
def test_however_many_measurements_wait_a_layer_merges_them_all_once(number: int) -> None:
    bn = nn.BatchNorm1d(3)
    layer = MeasuredLayer("bn", bn, statistics_of(bn))
    x = torch.randn(number, 5, 3)
    for i, part in enumerate(x):
        layer.note(Moments.of(part))
        if i == number // 2:
            assert layer.moments.count == 5 * (i + 1)
    for _ in range(2):  # looking does not change it
        check(layer, [as_array(x.reshape(-1, 3))])
    layer.forget()
    assert layer.moments.count == layer.spread.count == 0


def test_a_snapshot_brings_back_what_was_known() -> None:
    bn = nn.BatchNorm1d(3)
    layer = MeasuredLayer("bn", bn, statistics_of(bn))
    layer.note(Moments.of(torch.randn(5, 3)))
    restore = layer.snapshot()
    layer.note(Moments.of(torch.full((5, 3), float("nan"))), (), [1])
    assert layer.not_finite == {1}
    assert not layer.moments.is_finite
    restore()
    assert layer.moments.count == 5
    assert layer.not_finite == set()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_batches_with_values_that_are_not_finite_are_named(value: float) -> None:
    model, x = net(), images(9)
    x[5, 1, 2, 3] = value
    found = collector(model)
    for one in (chunks(x, 4, 2, 3), [join(chunks(x, 4, 2, 3))]):
        found.forget()
        for chunk in one:
            found.one_by_one([chunk], as_kernel=True)
        with pytest.raises(FinetuneBNError, match=r"layer 'bn1', from batches 1\".*in float16, for overflow"):
            found.check_finite(0, found.layers[0].moments)
        with pytest.raises(FinetuneBNError, match=r"'bn1', from batches 1\""):
            found.together(one, lambda done: None)


def test_all_of_the_first_images_tell_how_images_differ_and_few_of_the_later_ones() -> None:
    model = nn.BatchNorm2d(3).eval()
    found = collector(model, ("",))
    x = images(400, 4)
    counts = []
    for chunk in chunks(x, *[16] * 25):
        found.one_by_one([chunk], as_kernel=True)
        counts.append(int(found.layers[0].spread.count))
    assert counts[1] == 32
    assert 40 <= counts[-1] <= 80
    moments = found.layers[0].moments
    told = found.layers[0].spread.variance_per_image(moments.mean, moments.var())
    per_image = x.mean((2, 3)).var(0) / x.var((0, 2, 3))
    assert told is not None
    torch.testing.assert_close(told[0].float(), per_image, rtol=0.6, atol=0)


def test_an_error_in_the_model_takes_the_layers_forwards_back() -> None:
    model, x = net(), torch.randn(2, 5, 10, 10)
    found = collector(model)
    with untouched(model), pytest.raises(RuntimeError, match="to have 3 channels, but got 5"):
        found.one_by_one(chunks(x, 2), as_kernel=True)
    with untouched(model), pytest.raises(RuntimeError, match="to have 3 channels, but got 5"):
        found.together(chunks(x, 1, 1), lambda done: None)


def test_an_input_of_the_wrong_dimensions_is_refused_as_batch_norm_refuses_it() -> None:
    model = nn.BatchNorm1d(3).eval()
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        collector(model, ("",)).one_by_one(chunks(images(2), 2), as_kernel=True)


def test_two_values_have_a_variance_to_normalize_a_chunk_by_and_one_has_not() -> None:
    found = collector(net())
    before = found.layers[0].before
    channels = len(before.mean)
    x = torch.randn(2, channels, 1, generator=torch.Generator().manual_seed(0))
    by_both = found._of_chunk(0, Moments.of(x), as_kernel=True)
    np.testing.assert_allclose(by_both.var.numpy(), as_array(x).var((0, 2)), rtol=1e-5)
    assert found._of_chunk(0, Moments.of(x[:1]), as_kernel=True) is before
