"""Folded layers over two processes: the averaged gradients are those of one process with the whole batch."""

from __future__ import annotations

import socket
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.layers.folds import folds_in, unfolded
from tests.models import Plain, settle


def images() -> Tensor:
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = fbn.convert(settle(Plain()), fbn.Freeze("original", fold="always"), example_input=images())
    assert len(folds_in(model)) == 2
    return model


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).square().mean().backward()
    named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in named.items()}


def _two(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mine, mesh, found = images()[rank::2], init_device_mesh("cpu", (2,)), {}
    found["ddp"] = gradients(nn.parallel.DistributedDataParallel(net()), mine)
    model = fully_shard(net(), mesh=mesh)
    found["fsdp"] = gradients(model, mine)
    found["folded"] = len([fold for fold in folds_in(model) if fold.intact])
    model = net()
    fully_shard(model.bn1, mesh=mesh)
    try:
        gradients(fully_shard(model, mesh=mesh), mine)
    except ValueError as error:
        found["apart"] = str(error)
    results[rank] = {key: value if not isinstance(value, dict) else dict(value) for key, value in found.items()}
    torch.distributed.destroy_process_group()


def test_ddp_and_fsdp_average_the_gradients_of_one_process_or_refuse_by_name() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(_two, (port, results), nprocs=2)
    model = net()
    with unfolded(model):
        expected = gradients(model, images())
    for rank in range(2):
        found = results[rank]
        assert found["folded"] == 2
        for strategy in ("ddp", "fsdp"):
            assert found[strategy].keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[strategy][name], value, rtol=1e-4, atol=1e-6)
        assert "'...bn1' that is folded into it are in different FSDP units" in found["apart"]
