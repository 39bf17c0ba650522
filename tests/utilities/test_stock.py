"""A stock takes no more batches than are needed, and loses no image between two calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from finetune_bn.errors import BadData
from finetune_bn.utilities.batches import Chunk, Feeder, Stock


def stock(batches: Any, limit: int | None = None, forward: Any = None) -> Stock:
    return Stock(batches, Feeder(nn.Identity(), forward, None), limit)


def batches_of(*sizes: int) -> list[Tensor]:
    return list(torch.arange(sum(sizes)).float()[:, None].split(sizes))


def numbers(chunks: Any) -> list[int]:
    return [int(n) for chunk in chunks for n in chunk.content[0][0][:, 0]]


@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 9, 2), (12,), (1,) * 12])
@pytest.mark.parametrize("targets", [(12,), (1, 2, 3, 12), (5, 5, 11, 99), (float("inf"),)])
def test_calls_go_on_where_the_last_one_stopped(sizes: tuple[int, ...], targets: tuple[float, ...]) -> None:
    taken = stock(batches_of(*sizes))
    found: list[int] = []
    for target in targets:
        found += numbers(taken.up_to(target))
        assert found == list(range(int(min(target, 12))))
        assert taken.images == len(found)
    assert numbers(taken.up_to(100)) == list(range(len(found), 12))
    assert taken.exhausted


@pytest.mark.parametrize("limit", [0, 1, 6, 12, 20])
def test_no_more_than_the_limit_is_taken_from_an_endless_loader(limit: int) -> None:
    drawn = 0

    def endless() -> Iterator[Tensor]:
        nonlocal drawn
        while True:
            drawn += 1
            yield torch.zeros(4, 1)

    taken = stock(endless(), limit)
    assert sum(map(len, taken.up_to(float("inf")))) == limit
    assert taken.exhausted
    assert drawn == -(-limit // 4)
    assert list(taken.up_to(float("inf"))) == []


def test_the_loader_is_asked_for_a_batch_only_when_one_is_needed() -> None:
    asked: list[int] = []

    def loader() -> Iterator[Tensor]:
        for number in range(4):
            asked.append(number)
            yield torch.zeros(4, 1)

    taken = stock(loader())
    chunks = taken.up_to(10)
    assert asked == []
    next(chunks)
    assert asked == [0]
    assert [len(chunk) for chunk in chunks] == [4, 2]
    assert asked == [0, 1, 2]
    assert not taken.exhausted


def test_a_batch_that_cannot_be_cut_is_taken_whole() -> None:
    batch = {"x": torch.zeros(8, 2), "scale": torch.tensor(2.0)}
    taken = stock([batch, batch], 5, forward=lambda model, batch: None)
    assert [len(chunk) for chunk in taken.up_to(float("inf"))] == [8]
    assert taken.images == 8
    assert taken.exhausted


def test_images_keep_the_number_of_their_batch_and_their_place_in_it_when_it_is_cut() -> None:
    taken = stock(batches_of(3, 5))
    found: list[Chunk] = [*taken.up_to(4), *taken.up_to(8)]
    assert [(c.batch, c.position) for c in found] == [
        ((0, 0, 0), (0, 1, 2)),
        ((1,), (0,)),
        ((1, 1, 1, 1), (1, 2, 3, 4)),
    ]


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.zeros(6, 1))


@pytest.mark.parametrize(
    ("batches", "limit", "expected"),
    [
        (batches_of(4, 4, 1), None, 12),  # the last batch is not known to be short
        (batches_of(4, 4, 4), 5, 5),
        (iter(batches_of(4, 4)), None, 0),
        (DataLoader(Stream(), batch_size=2), None, 0),  # has a length, which raises
    ],
    ids=["list", "limit", "iterator", "loader of a stream"],
)
def test_how_many_there_will_be_is_told_where_the_loader_has_a_length(batches: Any, limit: Any, expected: int) -> None:
    taken = stock(batches, limit)
    assert taken.expected == 0
    next(taken.up_to(float("inf")))
    assert taken.expected == expected


def test_a_batch_that_is_none_is_named_by_its_number() -> None:
    taken = stock([torch.zeros(2, 1), "words"])
    with pytest.raises(BadData, match=r"batches\[1\]: got 'str'"):
        list(taken.up_to(float("inf")))
