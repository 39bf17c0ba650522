"""Four processes, each with a part of the images, give the statistics, batches, gradients and metrics of one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo  # what DistributedDataParallel imports, once for all processes
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import losses

import finetune_bn as fbn
from finetune_bn.metric_learning.gather import gather_batch
from finetune_bn.metric_learning.retrieval import retrieval, retrieval_report
from tests.models import Plain, settle

WORLD = 4
IMAGES = torch.randn(48, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IDENTITIES = torch.arange(48) // 3
DOMAINS = torch.arange(48) % 2
PARTS = [(0, 4), (4, 20), (20, 32), (32, 48)]  # of different sizes


def network(policy: fbn.Policy | None = None) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = settle(Plain()).double().eval()
    return net if policy is None else fbn.convert(net, policy, verify=False)


def recalibrated(images: Tensor, policy: fbn.Policy | None) -> dict[str, Tensor]:
    net = network(policy)
    record = fbn.recalibrate(net, images.split(5), progress=False)
    state = {name: value for name, value in net.state_dict().items() if "running" in name}
    return state | {"images": torch.tensor(record.images)}


def batches(**where: Any) -> Tensor:
    return torch.tensor(list(fbn.PKBatchSampler(IDENTITIES, 4, 2, num_batches=6, seed=3, **where)))


def gradients(net: nn.Module, model: nn.Module, rows: slice, gathers: bool) -> dict[str, Tensor]:
    embeddings, labels = model(IMAGES[rows]), IDENTITIES[rows]
    if gathers:
        embeddings, labels = gather_batch(embeddings, labels)
    loss = losses.NTXentLoss(0.1)(embeddings, labels)
    loss.backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def scores(**how: Any) -> dict[str, float]:
    with torch.no_grad():
        embeddings = network(fbn.Freeze("none"))(IMAGES)
    found = retrieval_report(embeddings, IDENTITIES, DOMAINS, ["ink", "oil"], **how).named()
    return found | retrieval(embeddings[:9], IDENTITIES[:9], embeddings[9:], IDENTITIES[9:] // 2, **how).scores


POLICIES = {"live": None, "frozen": fbn.Freeze("original")}


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/at", rank=rank, world_size=WORLD)
    own = slice(*PARTS[rank])
    found: dict[str, Any] = {name: recalibrated(IMAGES[own], policy) for name, policy in POLICIES.items()}
    found["batches"] = batches()
    net = network(fbn.Freeze("original"))
    found["gradients"] = gradients(net, DistributedDataParallel(net), own, gathers=True)
    found["scores"] = scores(over_processes=True)
    found["half"] = scores(over_processes=True, half=True)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(_work, (str(folder),), nprocs=WORLD, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=lambda said, n=name: f"{n}: {said}")


@pytest.mark.parametrize("policy", POLICIES)
def test_recalibration_gives_the_statistics_of_one_process(ranks: list[dict[str, Any]], policy: str) -> None:
    expected = recalibrated(IMAGES, POLICIES[policy])
    for found in ranks:
        close(found[policy], expected)
    part = recalibrated(IMAGES[slice(*PARTS[1])], POLICIES[policy])  # what a process would have by itself
    assert float((part["bn1.running_mean"] - expected["bn1.running_mean"]).abs().max()) > 1e-3


def test_batches_are_those_of_one_plan_and_share_no_label_within_a_step(ranks: list[dict[str, Any]]) -> None:
    steps = torch.stack([found["batches"] for found in ranks])
    assert torch.equal(steps, torch.stack([batches(rank=rank, world_size=WORLD) for rank in range(WORLD)]))
    labels = IDENTITIES[steps]
    for step in range(labels.shape[1]):
        assert all(len(part.unique()) == 4 for part in labels[:, step])
        assert len(labels[:, step].unique()) == 4 * WORLD


def test_a_loss_over_gathered_embeddings_has_the_gradients_of_one_process(ranks: list[dict[str, Any]]) -> None:
    net = network(fbn.Freeze("original"))
    expected = gradients(net, net, slice(None), gathers=False)
    assert len(expected) > 5
    for found in ranks:
        close(found["gradients"], expected)


@pytest.mark.parametrize("half", [False, True])
def test_retrieval_has_the_figures_of_one_process(ranks: list[dict[str, Any]], half: bool) -> None:
    expected = scores(half=half)
    assert 0 < expected["recall_at_1/across_domains"] < 1
    for found in ranks:
        assert found["half" if half else "scores"] == pytest.approx(expected, rel=1e-6)
    assert not any(math.isnan(value) for value in expected.values())
