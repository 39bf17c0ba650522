"""Four images tell whether batches may be cut and passes may stand side by side."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.layers.statistics import statistics_of
from finetune_bn.recalibration.measured_layer import MeasuredLayer
from finetune_bn.recalibration.rehearsal import Findings, Rehearsal, _hold_the_same, _limit, _near
from finetune_bn.utilities.batches import Chunk, Feeder
from finetune_bn.utilities.lockstep import caller_settings
from finetune_bn.utilities.module_state import ModuleState
from tests.models import Plain, settle
from tests.stateful_nets import TSM, Bag, SkipsInAttributes, SkipsInHooks, TimeFirst, images

CPU = torch.device("cpu")


def look(model: nn.Module, batches: list[Tensor], keep: bool | None = None, side_by_side: bool = True) -> Findings:
    model.eval()
    layers = [
        MeasuredLayer(name, m, statistics_of(m))
        for name, m in model.named_modules()
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))
    ]
    feeder = Feeder(model, None, None, bool(keep))
    chunks: list[Chunk] = [feeder.chunk(batch, number) for number, batch in enumerate(batches)]
    rehearsal = Rehearsal(layers, feeder, ModuleState(model), caller_settings(CPU))
    return rehearsal.look(chunks, keep=keep, side_by_side=side_by_side)


PLAIN = Findings(in_order=frozenset({0, 1}))


class Recorder(nn.Module):
    """Counts how many images go through it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen = 0
        self.register_forward_pre_hook(self.count)

    def count(self, module: nn.Module, args: Any) -> None:
        Recorder.total += len(args[0])

    total = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@pytest.mark.parametrize("sizes", [(16, 16), (4,), (2, 2), (1, 1), (3,), (2,), (16, 1)])
def test_a_plain_network_is_cut_and_its_passes_stand_side_by_side(sizes: tuple[int, ...]) -> None:
    found = look(settle(Plain()), list(images(sum(sizes)).split(sizes)))
    assert found in (PLAIN, Findings())  # parts of different sizes tell nothing of the order


@pytest.mark.parametrize(("batches", "seen"), [((32, 32), 12), ((3,), 9), ((2,), 6)])
def test_it_costs_four_images_or_one_small_batch_three_times(batches: tuple[int, ...], seen: int) -> None:
    """Joined, in two parts, and the parts side by side."""
    Recorder.total = 0
    look(Recorder(settle(Plain())), list(images(sum(batches)).split(batches)))
    assert Recorder.total == seen


def test_what_is_kept_between_layers_is_found_and_where() -> None:
    torch.manual_seed(0)
    found = look(SkipsInAttributes(), list(images(16).split(8)))
    assert (found.passes_mix, found.kept_in, found.kept_outside) == (True, ("skip_image", "skip_first"), False)
    found = look(SkipsInHooks(), list(images(16).split(8)))
    assert found.passes_mix
    assert found.kept_outside
    assert not look(SkipsInAttributes(), list(images(16).split(8)), side_by_side=False).passes_mix


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (TSM(5), list(images(20).split(10))),
        (TSM(3), [images(6)]),
        (Bag(), [torch.randn(9, 8)]),
        (TimeFirst(), [torch.randn(9, 3, 4), torch.randn(7, 3, 4)]),
    ],
    ids=["clips", "one batch of clips", "a bag", "time first"],
)
def test_batches_that_cannot_be_cut_are_found_and_kept_ones_are_not_looked_at(model: Any, batches: Any) -> None:
    assert look(model, batches) == Findings(parts_differ=True)
    assert look(model, batches, keep=True) == Findings()


class Rows(nn.Module):
    """[N, time, 8] to rows in the order of time: the same values in another order are no other values."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.bn = nn.Linear(8, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.lin(x.transpose(0, 1).flatten(0, 1)))


def test_rows_in_another_order_are_no_difference() -> None:
    assert look(Rows(), [torch.randn(8, 5, 8)]) == Findings()


def test_parts_hold_the_same_in_any_order_and_not_where_values_are_missing_or_channels_are_others() -> None:
    whole = torch.randn(6, 3, 2, 2)
    shuffled = whole[torch.randperm(6)]
    assert _hold_the_same(whole, [shuffled[:2], shuffled[2:]], 1e-4, 1e-5)
    assert not _hold_the_same(whole, [shuffled[:2], shuffled[3:]], 1e-4, 1e-5)  # an image is missing
    assert not _hold_the_same(whole, [shuffled[:3].reshape(3, 12, 1, 1), shuffled[3:]], 1e-4, 1e-5)  # as many values
    assert not _hold_the_same(whole, [shuffled[:2], 2 * shuffled[2:]], 1e-4, 1e-5)


def test_a_model_that_fails_on_a_whole_batch_says_so_itself() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        look(TSM(5), [torch.randn(8, 3, 8, 8)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rounding_is_no_difference(dtype: torch.dtype) -> None:
    model = settle(Plain()).to(dtype)
    assert look(model, [images(8).to(dtype)]) == PLAIN


def test_layers_at_which_an_image_is_several_rows_in_order_are_told_from_others() -> None:
    class Tokens(nn.Module):
        def __init__(self, time_first: bool) -> None:
            super().__init__()
            self.time_first, self.lin, self.bn = time_first, nn.Linear(8, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.lin((x.transpose(0, 1) if self.time_first else x).flatten(0, 1)))

    assert look(Tokens(False), [torch.randn(8, 5, 8)]).in_order == {0}
    assert look(Tokens(True), [torch.randn(8, 5, 8)]).in_order == frozenset()
    torch.manual_seed(0)
    x = torch.randn(64, 5, 8) + torch.randn(64, 1, 8)  # what varies is the image, not the token
    first = fbn.recalibrate(Tokens(False), x.split(8))
    images = fbn.recalibrate(Flat(), x.split(8))
    assert first.rows[0].standard_error == pytest.approx(images.rows[0].standard_error, rel=0.05)
    assert math.isnan(fbn.recalibrate(Tokens(True), x.split(8)).rows[0].standard_error)


class Flat(nn.Module):
    """The same with positions behind the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.bn = nn.Linear(8, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.lin(x).transpose(1, 2))


def test_what_a_channel_that_does_not_vary_differs_by_is_seen_against_eps() -> None:
    # BatchNorm divides by sqrt(var + eps): what is far smaller than that is not there for it.
    x = torch.zeros(16, 2, 3, 3)
    assert _near(x + 1e-4, x, 1e-2, 1e-3)
    assert not _near(x + 1e-2, x, 1e-2, 1e-3)
    assert not _near(x + 1e-4, x, 1e-2, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_half_precision_may_add_up_to_more_than_that_of_float32(dtype: torch.dtype) -> None:
    x = torch.randn(64, 4, 8, generator=torch.Generator().manual_seed(0))
    sd = x.movedim(1, 0).flatten(1).std(1).view(1, -1, 1)
    for share, in_half, in_float32 in ((0.005, True, True), (0.03, True, False), (0.3, False, False)):
        y = x + share * sd
        assert _near(y, x, _limit(x.to(dtype)), 0.0) == in_half
        assert _near(y, x, _limit(x), 0.0) == in_float32
