from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from finetune_bn.data.order import SeededOrder
from finetune_bn.errors import BadData
from finetune_bn.metric_learning.embeddings import Collected

CPU = torch.device("cpu")


def images(n: int, loader: int) -> TensorDataset:
    """Each image says which it is: (loader, number)."""
    return TensorDataset(torch.tensor([[float(loader), float(i)] for i in range(n)]), 10 * loader + torch.arange(n))


def collect(loaders: list[Any], world_size: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    collected = Collected(loaders, 2, CPU, world_size)
    for number, loader in enumerate(loaders):
        for rows, labels in loader:
            collected.add(rows, labels, number)
    return collected.rows()


def expected(sizes: list[int]) -> tuple[list[list[float]], list[int], list[int]]:
    every = [(loader, i) for loader, n in enumerate(sizes) for i in range(n)]
    return [[float(l), float(i)] for l, i in every], [10 * l + i for l, i in every], [l for l, _ in every]  # noqa: E741


@pytest.mark.parametrize("sizes", [[5], [3, 0, 4]])
def test_rows_come_in_the_order_of_loaders_and_images(sizes: list[int]) -> None:
    found = collect([DataLoader(images(n, i), batch_size=2) for i, n in enumerate(sizes)])
    assert tuple(part.tolist() for part in found) == expected(sizes)


def test_batches_of_loaders_may_come_in_turn() -> None:
    collected = Collected([None, None], 1, CPU)
    for number, loader in [(0, 1), (1, 0), (2, 1), (3, 0)]:
        collected.add(torch.tensor([[float(number)]]), torch.tensor([number]), loader)
    rows, labels, loaders = collected.rows()
    assert (rows[:, 0].tolist(), labels.tolist(), loaders.tolist()) == ([1, 3, 0, 2], [1, 3, 0, 2], [0, 0, 1, 1])


def test_rows_are_kept_without_their_graph_in_float32() -> None:
    collected = Collected([None], 2, CPU)
    collected.add(torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True), torch.tensor([3]), 0)
    rows = collected.rows()[0]
    assert (rows.dtype, rows.requires_grad) == (torch.float32, False)


def test_nothing_collected_has_no_rows() -> None:
    rows, labels, loaders = Collected([None], 7, CPU).rows()
    assert (rows.shape, labels.shape, loaders.shape) == ((0, 7), (0,), (0,))


def _rank(rank: int, world_size: int, file: str, sizes: list[int], padded: bool, results: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    loaders = []
    for number, n in enumerate(sizes):
        data = images(n, number)
        sampler: Any = DistributedSampler(data, shuffle=False)
        if not padded:
            sampler = SeededOrder(data, seed=0, shuffle=False, rank=rank, world_size=world_size, even=False)
        loaders.append(DataLoader(data, batch_size=2, sampler=sampler))
    seen = sum(len(loader.sampler) for loader in loaders)
    results[rank] = (seen, *(part.tolist() for part in collect(loaders, world_size)))
    torch.distributed.barrier()  # who leaves before the others have connected breaks their connection
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("world_size", "sizes", "padded", "seen"),
    [(2, [5, 4, 1], True, 6 + 4 + 2), (3, [7, 2], True, 9 + 3), (2, [5, 4, 1], False, 5 + 4 + 1), (2, [1], False, 1)],
)
def test_over_processes_each_image_is_kept_once_in_the_order_of_one_process(
    tmp_path: Any, world_size: int, sizes: list[int], padded: bool, seen: int
) -> None:
    results = mp.get_context("fork").Manager().dict()
    args = (world_size, str(tmp_path / "store"), sizes, padded, results)
    mp.start_processes(_rank, args, nprocs=world_size, start_method="fork")
    assert sum(results[rank][0] for rank in range(world_size)) == seen, "the samplers must repeat images, or not"
    for rank in range(world_size):
        assert results[rank][1:] == expected(sizes)


@pytest.mark.parametrize(
    "sampler", [None, DistributedSampler(images(4, 0), num_replicas=3, rank=0)], ids=["none", "for three"]
)
def test_a_loader_that_is_not_shared_among_the_processes_is_refused(sampler: Any) -> None:
    loader = DataLoader(images(4, 0), sampler=sampler)
    with pytest.raises(BadData, match=r"sampler of loader 0: got '\w+'; allowed: a DistributedSampler for 2 processes"):
        Collected([loader], 2, CPU, world_size=2)
