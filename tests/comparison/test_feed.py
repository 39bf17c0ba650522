"""The same batches for each treatment, whatever the network draws in between; the loader is left as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from finetune_bn.comparison import feed as feed_module
from finetune_bn.comparison.feed import Feed, as_batches, one_by_one
from finetune_bn.errors import BadData, FinetuneBNError
from finetune_bn.metric_learning.pk_sampler import PKBatchSampler


class Augmented(TensorDataset):
    """Adds random numbers of torch and of Python to each image."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + torch.rand(()) + random.random(), y


DATA = Augmented(torch.arange(10.0)[:, None], torch.arange(10) % 5)


def loaders() -> dict[str, Any]:
    sampler = DistributedSampler(DATA, num_replicas=1, rank=0)
    return {
        "shuffled": DataLoader(DATA, batch_size=4, shuffle=True),
        "own generator": DataLoader(DATA, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(7)),
        "set_epoch": DataLoader(DATA, batch_size=4, sampler=sampler),
        "P x K": DataLoader(DATA, batch_sampler=PKBatchSampler(DATA.tensors[1].tolist(), 2, 2, seed=0)),
    }


def taken(feed: Feed, seed: int, number: int, draw: bool = False) -> list[Tensor]:
    found = []
    for x, _ in feed.take(seed, number):
        found.append(x)
        if draw:  # as dropout does
            torch.rand(3)
            random.random()
    return found


@pytest.mark.parametrize("kind", loaders())
@pytest.mark.parametrize("memory", [0, 2**20])
def test_a_seed_gives_the_same_batches_whatever_is_drawn_in_between(
    kind: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "MEMORY", memory)
    feed = Feed(loaders()[kind], "train")
    first = taken(feed, 0, 7)
    torch.manual_seed(99)
    random.seed(99)
    assert len(first) == 7
    assert all(map(torch.equal, taken(feed, 0, 4, draw=True), first[:4]))
    assert all(map(torch.equal, taken(feed, 0, 7, draw=True), first))
    assert not all(torch.equal(a, b) for a, b in zip(taken(feed, 1, 2), first, strict=False))
    assert not torch.equal(torch.cat(first[:2]).sort(0)[0], torch.cat(first[3:5]).sort(0)[0])


def test_the_random_states_outside_go_on_as_if_nothing_had_been_read() -> None:
    feed = Feed(loaders()["shuffled"], "train")
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    drawn = []
    for _ in feed.take(0, 4):
        drawn.append(torch.rand(1))
    assert torch.equal(torch.cat(drawn), expected)


def test_the_loader_is_left_as_it_was() -> None:
    for kind in ("own generator", "set_epoch", "P x K"):
        torch.manual_seed(0)
        random.seed(0)
        untouched = [x for x, _ in loaders()[kind]]
        loader = loaders()[kind]
        feed = Feed(loader, "train")
        list(feed.take(3, 5))
        feed.leave()
        torch.manual_seed(0)
        random.seed(0)
        assert all(map(torch.equal, [x for x, _ in loader], untouched)), kind


def test_what_a_model_writes_into_a_batch_is_not_in_the_next_one() -> None:
    feed = Feed(DataLoader(DATA, batch_size=5, shuffle=True), "train")
    first = [x.clone() for x, _ in feed.take(0, 2)]
    for x, _ in feed.take(0, 2):
        x.zero_()
    assert all(map(torch.equal, [x for x, _ in feed.take(0, 2)], first))


def test_pairs_of_tensors_are_cut_and_lists_of_batches_are_mixed() -> None:
    x, y = torch.arange(10.0)[:, None], torch.arange(10)
    feed = Feed(as_batches((x, y), "train", 4, training=True), "train")
    epoch = list(feed.epoch(0, 0))
    assert [len(labels) for _, labels in epoch] == [4, 4]  # a last one of two is left out
    assert all(torch.equal(images[:, 0].long(), labels) for images, labels in epoch)
    few = Feed(as_batches((x[:3], y[:3]), "train", 4, training=True), "train")
    assert [len(labels) for _, labels in few.epoch(0, 0)] == [3]
    batches = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 10, 2)]
    mixed = Feed(as_batches(batches, "train", None, training=True), "train")
    orders = [torch.cat([labels for _, labels in mixed.epoch(seed, 0)]).tolist() for seed in (0, 1)]
    assert sorted(orders[0]) == list(range(10))
    assert orders[0] != orders[1]


def test_images_one_by_one_are_those_of_the_data_set_in_another_order_than_a_label_sampler_has() -> None:
    images = TensorDataset(torch.arange(40.0)[:, None], torch.arange(40) // 4)
    loader = DataLoader(images, batch_sampler=PKBatchSampler((torch.arange(40) // 4).tolist(), 2, 4, seed=0))
    first, second = (torch.cat([x for x, _ in one_by_one(loader)])[:, 0].tolist() for _ in range(2))
    assert sorted(first) == list(range(40))
    assert first == second != list(range(40))


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(4.0)


def test_what_can_be_read_once_alone_or_is_empty_is_refused() -> None:
    assert len(list(Feed(DataLoader(Stream(), batch_size=2), "train").take(0, 3))) == 3
    with pytest.raises(FinetuneBNError, match=r"train: got .*generator.*; allowed: batches that can be taken anew"):
        Feed((x for x in [torch.zeros(1)]), "train")
    with pytest.raises(FinetuneBNError, match="train: got 'no batch'; allowed: one batch or more"):
        list(Feed([], "train").take(0, 1))
    with pytest.raises(BadData, match="got '3 inputs and 2 targets'"):
        as_batches((torch.zeros(3, 1), torch.zeros(2)), "train", 2, training=True)
    with pytest.raises(FinetuneBNError, match="batch_size: got None"):
        as_batches((torch.zeros(3, 1), torch.zeros(3)), "train", None, training=True)
