"""Loaders that draw every image once, whatever the loader draws that they are made from."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from finetune_bn.callbacks.batches import iid_loader
from finetune_bn.errors import FinetuneBNError


class Numbers(Dataset[Tensor]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


def drawn(loader: DataLoader[Any]) -> list[int]:
    return [int(i) for batch in loader for i in batch.reshape(-1)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_iid_loader_draws_every_image_once_over_all_ranks_in_an_order_that_the_seed_decides(
    world_size: int,
) -> None:
    source = DataLoader(Numbers(20), batch_sampler=BatchSampler(list(range(4)), 4, drop_last=True))
    parts = [iid_loader(source, 0, rank, world_size) for rank in range(world_size)]
    found = [drawn(part) for part in parts]
    assert sorted(chain(*found)) == list(range(20))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert list(chain(*found)) != list(range(20))
    assert [drawn(part) for part in parts] == found, "the same at each pass"
    assert drawn(iid_loader(source, 1, 0, world_size)) != found[0]
    assert parts[0].batch_size == 4


def test_the_iid_loader_keeps_collate_function_workers_and_whole_batches_of_a_data_set() -> None:
    def collate(items: list[Tensor]) -> Tensor:
        return torch.stack(items) + 100

    source = DataLoader(Numbers(5), 2, collate_fn=collate, num_workers=1, prefetch_factor=3, drop_last=True)
    found = iid_loader(source)
    assert (found.collate_fn, found.num_workers, found.prefetch_factor) == (collate, 1, 3)
    assert sorted(drawn(DataLoader(found.dataset, sampler=found.sampler, collate_fn=collate))) == [*range(100, 105)]
    assert sorted(drawn(iid_loader(DataLoader(Numbers(5), batch_size=None)))) == [0, 1, 2, 3, 4]


def test_a_data_set_without_a_length_is_an_error() -> None:
    class Endless(Dataset[Tensor]):
        def __getitem__(self, index: int) -> Tensor:
            return torch.tensor(index)

    with pytest.raises(FinetuneBNError, match="dataset: got 'Endless'; allowed: a data set with a length"):
        iid_loader(DataLoader(Endless(), sampler=[1, 2]))
