"""The columns of the interplay matrix that take two processes; all of their cells run in one pair of them."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.nn.parallel import DistributedDataParallel

from tests.interplay.loops import Steps
from tests.interplay.trainers import Module, fit
from tests.interplay.treatments import BATCH, ROWS, Ran, Treatment, images, plain

WORLD = 2


def batches() -> Any:
    """Return the training batches of this process."""
    x, y = images(WORLD * 16).tensors
    rank = torch.distributed.get_rank()
    return list(zip(x[rank::WORLD].split(BATCH), y[rank::WORLD].split(BATCH), strict=True))


def wrapped(**options: Any) -> Callable[[Treatment, Path], Ran]:
    def column(treatment: Treatment, folder: Path) -> Ran:
        steps = Steps(treatment)
        steps.net = DistributedDataParallel(steps.inner, **options)
        steps.tolerance = 1e-3
        return steps.run(batches())

    return column


def two_forwards(treatment: Treatment, folder: Path) -> Ran:
    """Two forward passes before one backward pass, with buffers broadcast in front of each."""
    steps = Steps(treatment)
    steps.net = DistributedDataParallel(steps.inner)
    steps.forward = lambda x: steps.net(x) + steps.net(x.flip(3))
    return steps.run(batches())


def fully_sharded(treatment: Treatment, folder: Path) -> Ran:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    steps = Steps(treatment)
    fully_shard(steps.inner, mesh=init_device_mesh("cpu", (WORLD,)))
    steps.optimizer = torch.optim.SGD([p for p in steps.inner.parameters() if p.requires_grad], lr=0.05)
    return steps.run(batches())


def ddp(treatment: Treatment, folder: Path) -> Ran:
    return fit(treatment, folder, max_epochs=1, n=WORLD * 16, strategy="ddp", devices=WORLD)


class Sharded(Module):
    """Shards its parts, as Lightning's ModelParallelStrategy wants it."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for part in (self.backbone, self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def model_parallel(treatment: Treatment, folder: Path) -> Ran:
    strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
    return fit(
        treatment, folder, module=Sharded(), max_epochs=1, n=WORLD * 16, strategy=strategy, devices=WORLD,
        sync_batchnorm=True,
    )  # fmt: skip


COLUMNS: dict[str, Callable[[Treatment, Path], Ran]] = {
    "ddp": ddp,
    "ddp_find_unused": wrapped(find_unused_parameters=True),
    "ddp_static_graph": wrapped(static_graph=True),
    "ddp_two_forwards": two_forwards,
    "ddp_no_broadcast": wrapped(broadcast_buffers=False),
    "fsdp2": fully_sharded,
    "model_parallel": model_parallel,
}


def _cell(column: Callable[[Treatment, Path], Ran], treatment: Treatment, folder: Path) -> dict[str, Any]:
    """Return what came of a cell in this process: an error by its class and words, or what was the same in both."""
    found: dict[str, Any] = {"error": None, "kept": None, "warnings": []}
    try:
        ran = column(treatment, folder)
    except Exception as error:
        return found | {"error": (type(error).__name__, str(error))}
    try:
        treatment.holds(ran)
    except AssertionError as error:
        found["kept"] = str(error) or "an assertion"
    states: list[Any] = [None] * WORLD
    torch.distributed.all_gather_object(states, plain(ran.net))
    apart = sorted(name for name in states[0] if not torch.equal(states[0][name], states[1][name]))
    return found | {"apart": apart, "warnings": ran.warnings}


def _work(rank: int, port: int, folder: str, wanted: list[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "finetune_bn"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # As torchrun starts processes, so that Lightning makes none.
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "interplay",
    }  # fmt: skip
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    found = []
    for column, row in wanted:
        treatment = next(t for t in ROWS if t.key == row)
        with contextlib.redirect_stdout(io.StringIO()):
            found.append(_cell(COLUMNS[column], treatment, Path(folder, column, row)))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def run(cells: list[tuple[str, str]], folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Run cells in two processes, and return what came of each, by process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_work, (port, str(folder), cells), nprocs=WORLD, start_method="fork")
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]
    return {cell: [of_rank[number] for of_rank in found] for number, cell in enumerate(cells)}
