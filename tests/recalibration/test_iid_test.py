"""Batches whose images resemble each other are found out, i.i.d. ones are not, and the price is one small pass."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.recalibration.iid_test import Membership
from finetune_bn.utilities.batches import Chunk, Feeder
from tests.tools import untouched

REHEARSED = 12  # four images together, two and two, and these side by side
KEPT = 24  # two images of each of twelve batches


class Net(nn.Module):
    """One conv and one BatchNorm; counts the images that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.bn(self.conv(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def images(number: int, offset: Tensor | float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 3, 8, 8, generator=generator) + 3 * torch.as_tensor(offset).view(-1, 1, 1, 1)


def see(batches: Iterable[Tensor], membership: Membership | None = None) -> Membership:
    found, feeder = membership or Membership(), Feeder(nn.Identity(), None, None)
    for number, batch in enumerate(batches):
        found.see(feeder.chunk(batch, number))
    return found


def p_value(membership: Membership, model: Net) -> float | None:
    def run(chunk: Chunk) -> None:
        with torch.no_grad():
            model(chunk.content[0][0])

    return membership.p_value(run, [model.bn])


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_sorted_stream_has_a_small_p_value_and_the_same_images_shuffled_have_not(size: int) -> None:
    x = images(96, torch.arange(12).repeat_interleave(8))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(2))
    in_order, shuffled = p_value(see(x.split(size)), net()), p_value(see(x[order].split(size)), net())
    assert in_order is not None
    assert shuffled is not None
    assert in_order < 1e-3 < 0.01 < shuffled


def test_false_alarms_are_as_rare_as_the_p_value_says() -> None:
    low = 0
    for seed in range(40):
        x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        p = p_value(see(x.split(4)), net())
        assert p is not None
        low += p < 0.1
    assert low <= 10  # 4 expected; more than 10 of 40 has a probability below 0.002


@pytest.mark.parametrize("batches", [5, 30, 200])
def test_however_many_batches_come_few_images_are_kept_and_they_are_spread_over_all(batches: int) -> None:
    model = net()
    membership = see(images(4 * batches).split(4))
    assert p_value(membership, model) is not None
    assert model.seen == min(2 * batches, KEPT)
    kept = [number for number, _ in membership._kept]
    assert kept[0] == 0
    assert kept[-1] >= batches * 0.8 - 1
    assert len({later - earlier for earlier, later in itertools.pairwise(kept)}) == 1


def test_what_cannot_be_compared_is_not_judged() -> None:
    assert p_value(Membership(), net()) is None
    assert p_value(see(images(12).split(4)), net()) is None  # three batches
    assert p_value(see(images(40).split(1)), net()) is None  # no two images came together
    chunk = Feeder(nn.Identity(), lambda model, batch: None, None).chunk({"x": images(4), "t": torch.tensor(1.0)}, 0)
    membership = Membership()
    membership.see(chunk)  # it cannot be cut
    assert membership._kept == []


def test_the_rest_of_a_batch_that_was_cut_is_not_taken_for_a_batch_of_its_own() -> None:
    membership = Membership()
    chunk = Feeder(nn.Identity(), None, None).chunk(images(8), 0)
    for part in (chunk[:4], chunk[4:]):
        membership.see(part)
    assert [number for number, _ in membership._kept] == [0]


def test_batches_of_different_sizes_are_compared_too() -> None:
    batches = [images(4, k)[:, :, : 6 + k % 3, : 6 + k % 3] for k in range(12)]
    assert p_value(see(batches), net()) < 1e-3  # type: ignore[operator]


@pytest.mark.parametrize(("mode", "batch_size"), [("exact", None), ("one_pass", None), ("one_pass", 32)])
def test_one_normalization_of_all_images_tells_without_a_further_pass(mode: str, batch_size: int | None) -> None:
    model = net()
    x = images(96, torch.arange(12).repeat_interleave(8))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(2))
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for batches, alarms in ((x, 1), (x[order], 0)):
        seen.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            record = fbn.recalibrate(model, batches.split(8), mode=mode, batch_size=batch_size)  # type: ignore[arg-type]
        assert len(record.warnings) == len(caught) == alarms
        weighed = 2 if mode == "one_pass" and batch_size is None else 0
        # 32 normalized together is not one normalization of all: the batches that meet there differ in it.
        assert sum(seen) == 96 + weighed + REHEARSED + (KEPT if batch_size else 0)


def test_a_run_that_is_watched_compares_what_a_further_pass_would_and_leaves_no_hook() -> None:
    model = net()
    chunks = [Feeder(nn.Identity(), None, None).chunk(part, n) for n, part in enumerate(images(96).split(8))]
    membership, current = Membership(), chunks[:1]
    for chunk in chunks:
        membership.see(chunk)
    expected = p_value(membership, model)
    with untouched(model), membership.watching([model.bn], lambda: current[0]), torch.no_grad():
        for current[0] in chunks:
            model(current[0].content[0][0])
    model.seen = 0
    assert p_value(membership, model) == pytest.approx(expected)
    assert model.seen == 0
    membership.forget()
    assert p_value(membership, model) == pytest.approx(expected)
    assert model.seen == KEPT


def test_channels_that_are_not_finite_are_left_out_and_an_error_leaves_no_hook() -> None:
    x = images(96, torch.arange(12).repeat_interleave(8))
    x[:, 1] = float("nan")
    model = nn.BatchNorm2d(3).eval()

    def run(chunk: Chunk) -> None:
        model(chunk.content[0][0])

    p = see(x.split(8)).p_value(run, [model])
    assert p is not None
    assert p < 1e-3

    def fail(chunk: Chunk) -> None:
        raise RuntimeError("no memory")

    with untouched(model), pytest.raises(RuntimeError, match="no memory"):
        see(x.split(8)).p_value(fail, [model])
