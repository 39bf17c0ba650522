"""Layers that share the backward pass over two processes: the averaged gradients are those of one process."""

from __future__ import annotations

import socket
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import finetune_bn as fbn
from tests.models import Plain, settle


def images() -> Tensor:
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def net(fold: str = "always") -> nn.Module:
    torch.manual_seed(0)
    return fbn.convert(settle(Plain()), fbn.Freeze("original", fold=fold), example_input=images())  # type: ignore[arg-type]


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
    found["fsdp"] = gradients(fully_shard(net(), mesh=mesh), mine)
    model = net()
    for part in (model.conv1, model.bn1):
        fully_shard(part, mesh=mesh)
    found["fsdp, each layer a unit"] = gradients(fully_shard(model, mesh=mesh), mine)
    results[rank] = {key: dict(value) for key, value in found.items()}
    torch.distributed.destroy_process_group()


def test_ddp_and_fsdp_average_the_gradients_of_one_process() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(_two, (port, results), nprocs=2)
    expected = gradients(net("never"), images())
    for rank in range(2):
        assert len(results[rank]) == 3
        for found in results[rank].values():
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
