"""A loss over several processes is that of one process with the whole batch: value and gradients to 1e-6."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # what DistributedDataParallel imports, once for all processes
import torch.multiprocessing as mp
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from finetune_bn.errors import FinetuneBNError
from finetune_bn.metric_learning.gather import gather_batch

IMAGES = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(24) // 2
KINDS = ("NT-Xent", "contrastive", "mined triplets", "proxies")
SHARES = {2: [(0, 12), (12, 24)], 4: [(0, 6), (6, 12), (12, 18), (18, 24)], 3: [(0, 2), (2, 16), (16, 24)]}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def loss_of(kind: str) -> nn.Module:
    torch.manual_seed(2)
    made: dict[str, Any] = {
        "NT-Xent": lambda: losses.NTXentLoss(0.1),
        "contrastive": losses.ContrastiveLoss,
        "mined triplets": losses.TripletMarginLoss,
        "proxies": lambda: losses.ProxyAnchorLoss(num_classes=12, embedding_size=5).double(),
    }
    loss: nn.Module = made[kind]()
    return loss


def miner_of(kind: str) -> nn.Module | None:
    return miners.MultiSimilarityMiner() if kind == "mined triplets" else None


def step(kind: str, loss: nn.Module, embeddings: Tensor, labels: Tensor) -> Tensor:
    miner = miner_of(kind)
    value: Tensor = loss(embeddings, labels, None if miner is None else miner(embeddings, labels))
    return value


def _train(rank: int, shares: list[tuple[int, int]], folder: str, gathers: bool) -> None:
    torch.set_num_threads(1)
    world = len(shares)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/at", rank=rank, world_size=world)
    results = {}
    for kind in KINDS:
        net, loss = network(), loss_of(kind)
        model = DistributedDataParallel(net)
        own = slice(*shares[rank])
        embeddings, labels = model(IMAGES[own]), LABELS[own]
        if gathers:
            embeddings, labels = gather_batch(embeddings, labels)
        value = step(kind, loss, embeddings, labels)
        value.backward()
        found = {"value": value.detach(), "labels": labels, "net": [p.grad for p in net.parameters()]}
        results[kind] = found | {"loss": [p.grad for p in loss.parameters()]}
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(world: int, folder: Path, gathers: bool = True) -> list[dict[str, dict[str, Any]]]:
    """Return what each rank found for each kind of loss."""
    mp.start_processes(_train, (SHARES[world], str(folder), gathers), nprocs=world, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def alone(kind: str) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    net, loss = network(), loss_of(kind)
    value = step(kind, loss, net(IMAGES), LABELS)
    value.backward()
    return value.detach(), [p.grad for p in net.parameters()], [p.grad for p in loss.parameters()]  # type: ignore[misc]


def far(ours: list[Tensor], theirs: list[Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max((float((a - b).abs().max() / b.abs().max()) for a, b in pairs), default=0.0)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_loss_and_gradients_are_those_of_one_process_also_for_batches_of_different_sizes(
    tmp_path: Path, world: int
) -> None:
    ranks = run(world, tmp_path)
    for kind in KINDS:
        value, gradients, of_loss = alone(kind)
        for found in ranks:
            assert torch.equal(found[kind]["labels"], LABELS)
            assert abs(float(found[kind]["value"] - value)) < 1e-6
            assert far(found[kind]["net"], gradients) < 1e-6
            assert far(found[kind]["loss"], of_loss) < 1e-6


def test_without_gathering_the_negatives_of_the_others_are_missing(tmp_path: Path) -> None:
    value, gradients, _ = alone("NT-Xent")
    found = [rank["NT-Xent"] for rank in run(4, tmp_path, gathers=False)]
    assert all(float(value - one["value"]) > 0.1 for one in found)
    assert far(found[0]["net"], gradients) > 0.1


def test_alone_the_batch_is_what_was_given() -> None:
    embeddings = IMAGES.clone().requires_grad_()
    gathered, labels = gather_batch(embeddings, LABELS)
    assert gathered is embeddings
    assert labels is LABELS


def test_labels_of_another_number_are_refused() -> None:
    with pytest.raises(FinetuneBNError, match=r"embeddings, labels: got '\[24, 6\] and \[3\]'"):
        gather_batch(IMAGES, LABELS[:3])
