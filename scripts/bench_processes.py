"""What several processes say to each other in a training step, by what is done to the BatchNorm layers.

Counted at 1, 2 and 4 processes (gloo, CPU): the collectives of a step of ResNet-50 under DistributedDataParallel and
their bytes, for live layers, live ones that are synchronized, and frozen ones; and those of `recalibrate`, of a loss
over all processes and of retrieval. A count is the same on every machine. torch's SyncBatchNorm runs on accelerators
alone, so its exchanges are made here as it makes them (2 C + 1 numbers gathered forward, 2 C summed backward).
Then the time of a step at 1, 2 and 4 processes, of ResNet-50 with a 16th of the channels, variants in turn, medians, as
ratios to the frozen one: processes share 2 CPU cores, so it is what synchronizing costs beside little arithmetic. Then
on paper, from the counts, to 64 nodes of 8 GPUs.

Hardware: 2 CPU cores, 5 minutes. Result: results/bench_processes.json and .md, bench_processes_paper.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what DistributedDataParallel imports, once for all processes
import torch.distributed as dist
import torch.multiprocessing as mp
from step_variants import base_network, replace_norms
from store import Store, write_atomically
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import finetune_bn as fbn
from finetune_bn.metric_learning.gather import gather_batch
from finetune_bn.metric_learning.retrieval import retrieval

ROOT = Path(__file__).resolve().parent.parent
WORLDS = (1, 2, 4)
SYNC, LIVE, UNSENT = "live, synchronized", "live", "live, broadcast_buffers=False"
NONE, ORIGINAL = "frozen, none", "frozen, original"
VARIANTS = (LIVE, UNSENT, SYNC, NONE, ORIGINAL)
# On paper: 8 GPUs a node; seconds that a small collective takes in a node, and more for each doubling of the nodes;
# bytes a second that a GPU sends.
GPUS, IN_NODE, BY_DOUBLING, RATE = 8, 20e-6, 10e-6, 25e9


class _Synchronized(torch.autograd.Function):
    """Batch normalization by the statistics of all processes, with the exchanges of torch's SyncBatchNorm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        own = torch.cat([x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0), x.new_full((1,), x[:, 0].numel())])
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own)
        means, variances, counts = torch.stack(gathered).split([x.shape[1], x.shape[1], 1], dim=1)
        share = counts / counts.sum()
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
        scale = torch.rsqrt(var + eps)
        normal = (x - mean[:, None, None]) * scale[:, None, None]
        ctx.save_for_backward(normal, weight * scale, counts.sum())
        return normal * weight[:, None, None] + bias[:, None, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        normal, scale, count = ctx.saved_tensors
        own = torch.cat([gradient.sum((0, 2, 3)), (gradient * normal).sum((0, 2, 3))])
        whole = own.clone()
        dist.all_reduce(whole)
        one, two = (whole / count).chunk(2)
        back = (gradient - one[:, None, None] - normal * two[:, None, None]) * scale[:, None, None]
        bias, weight = own.chunk(2)
        return back, weight, bias, None


class Synchronized(nn.BatchNorm2d):
    """BatchNorm over all processes; alone, BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        if dist.get_world_size() == 1 or not self.training:
            return super().forward(x)
        found: Tensor = _Synchronized.apply(x, self.weight, self.bias, self.eps)
        return found


def synchronized(bn: nn.BatchNorm2d) -> nn.Module:
    """Return the same layer, synchronized."""
    made = Synchronized(bn.num_features, bn.eps, bn.momentum)
    made.load_state_dict(bn.state_dict())
    return made


class Traffic:
    """Counts collectives and their bytes, by name, while it is on."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()

    def note(self, name: str, sent: int, received: int) -> None:
        """Count one collective of a process."""
        self.calls[name] += 1
        self.sent[name] += sent
        self.received[name] += received

    def __enter__(self) -> Traffic:
        self._old: dict[str, Any] = {n: getattr(dist, n) for n in ("all_gather", "all_reduce", "_broadcast_coalesced")}

        def all_gather(tensors: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.note("gather", size(tensor), sum(map(size, tensors)))
            return self._old["all_gather"](tensors, tensor, *args, **kwargs)

        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.note("sum", size(tensor), size(tensor))
            return self._old["all_reduce"](tensor, *args, **kwargs)

        def broadcast(group: Any, tensors: list[Tensor], *args: Any) -> Any:
            self.note("buffers", sum(map(size, tensors)), sum(map(size, tensors)))
            return self._old["_broadcast_coalesced"](group, tensors, *args)

        dist.all_gather, dist.all_reduce, dist._broadcast_coalesced = all_gather, all_reduce, broadcast
        return self

    def __exit__(self, *exception: object) -> None:
        for name, function in self._old.items():
            setattr(dist, name, function)

    def row(self) -> dict[str, Any]:
        """Return what was counted; the sums of gradients, which go by `all_reduce` too, apart from the others."""
        for counter in (self.calls, self.sent, self.received):
            counter["sum"] -= counter["gradients"]
        return {name: +getattr(self, name) for name in ("calls", "sent", "received")}


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def network(variant: str, narrow: int) -> nn.Module:
    """Return ResNet-50 in training mode with its layers treated."""
    net = base_network("resnet50", 32, narrow)
    if variant == SYNC:
        return replace_norms(net, synchronized)
    if variant in (NONE, ORIGINAL):
        net = fbn.convert(net, fbn.Freeze(variant.removeprefix("frozen, ")), verify=False)
    return net.train()


class Step:
    """A step of a variant under DistributedDataParallel, with its gradients counted where `traffic` is there."""

    def __init__(self, variant: str, narrow: int, pixels: int, images: int) -> None:
        self.traffic: Traffic | None = None
        options = {"broadcast_buffers": variant != UNSENT, "gradient_as_bucket_view": True}
        self.model = DistributedDataParallel(network(variant, narrow), **options)
        self.model.register_comm_hook(None, self._hook())
        self.x, self.y = torch.randn(images, 3, pixels, pixels), torch.arange(images)

    def _hook(self) -> Any:
        def reduce(state: Any, bucket: Any) -> Any:
            if self.traffic is not None:
                self.traffic.note("gradients", size(bucket.buffer()), size(bucket.buffer()))
            return allreduce_hook(state, bucket)

        reduce.__annotations__ = {"bucket": dist.GradBucket}  # no string: DistributedDataParallel looks at it
        return reduce

    def __call__(self) -> None:
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.model.zero_grad()


def counted(run: Callable[[], Any]) -> dict[str, Any]:
    with Traffic() as traffic:
        run()
    return traffic.row()


def verbs() -> dict[str, Callable[[], Any]]:
    """Return what of this package talks to other processes outside of a step."""
    world, rank = dist.get_world_size(), dist.get_rank()
    draw = torch.Generator().manual_seed(rank)
    embeddings = torch.randn(32, 128, generator=draw).requires_grad_()
    same = torch.randn(64 * world, 128, generator=torch.Generator().manual_seed(9))
    net = network(LIVE, 16)

    def loss() -> None:
        gathered, labels = gather_batch(embeddings, torch.arange(32) // 2)
        (gathered.square().sum() + labels.sum()).backward()

    images = torch.randn(16, 3, 32, 32, generator=draw)
    return {
        "recalibrate, exact, 53 layers": lambda: fbn.recalibrate(net, [images], mode="exact", progress=False),
        "gather_batch and its backward, 32 x 128 a process": loss,
        "retrieval, queries cut over processes": lambda: retrieval(
            same, torch.arange(len(same)) // 4, over_processes=True
        ),
    }


def _work(rank: int, world: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/at", rank=rank, world_size=world)
    rows: list[dict[str, Any]] = []
    for variant in VARIANTS:
        step = Step(variant, 1, 32, 2)
        step()
        step()  # the first has made the buckets anew
        with Traffic() as step.traffic:
            step()
        rows.append({"what": "step", "variant": variant, **step.traffic.row()})
        del step
        gc.collect()
    rows += [{"what": "verb", "variant": name, **counted(run)} for name, run in verbs().items()]
    steps = {variant: Step(variant, 16, 64, 4) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(rounds + 2):
        for variant, run in steps.items():
            dist.barrier()
            begin = time.perf_counter()
            run()
            dist.barrier()
            if turn > 1:
                times[variant].append(time.perf_counter() - begin)
    rows += [
        {"what": "time", "variant": variant, "ms": round(1000 * statistics.median(found), 3)}
        for variant, found in times.items()
    ]
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure(world: int, rounds: int) -> list[dict[str, Any]]:
    """Return what rank 0 of so many processes counted and timed."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_work, (world, folder, rounds), nprocs=world, start_method="fork")
        rows: list[dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text(encoding="utf-8"))
    return rows


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def kilobytes(count: float) -> str:
    return f"{count / 1000:,.1f}" if count else "0"


def worlds_of(store: Store) -> list[int]:
    """Return the numbers of processes that were measured."""
    return [world for world in WORLDS if store.done({"world": world})]


def counts_table(store: Store) -> str:
    """Return the collectives of a step, and of the verbs, at each number of processes."""
    worlds = worlds_of(store)
    head = ["a step of ResNet-50"]
    for w in worlds[1:]:
        head += [f"exchanges of norm layers, {w} processes", "kB received by each"]
    head += ["buffers sent, kB", "gradients, kB"]
    lines = []
    for variant in VARIANTS:
        rows = {w: store.find(what="step", variant=variant, world=w) or {} for w in worlds}
        cells = [variant]
        for w in worlds[1:]:
            cells.append(str(sum(rows[w]["calls"].get(kind, 0) for kind in ("gather", "sum"))))
            cells.append(kilobytes(sum(rows[w]["received"].get(kind, 0) for kind in ("gather", "sum"))))
        last = rows[worlds[-1]]["sent"]
        lines.append([*cells, kilobytes(last.get("buffers", 0)), kilobytes(last.get("gradients", 0))])
    text = table(head, lines)
    names = list(dict.fromkeys(row["variant"] for row in store.rows if row["what"] == "verb"))
    lines = []
    for name in names:
        rows = [store.find(what="verb", variant=name, world=w) or {} for w in worlds]
        lines.append([name, *(str(sum(r["calls"].values())) for r in rows), kilobytes(sum(rows[-1]["sent"].values()))])
    head = ["once", *(f"collectives, {w} process{'es' * (w > 1)}" for w in worlds), "kB sent by each of the last"]
    return text + "\n" + table(head, lines)


def times_table(store: Store) -> str:
    """Return the time of a step as a ratio to the frozen one of as many processes."""
    lines = []
    for variant in VARIANTS:
        cells = [variant]
        for w in worlds_of(store):
            own, base = (store.find(what="time", variant=v, world=w) for v in (variant, NONE))
            cells.append(f"{own['ms'] / base['ms']:.2f}" if own and base else "-")
        lines.append(cells)
    return table(["time of a step, of frozen", *(f"{w} process{'es' * (w > 1)}" for w in worlds_of(store))], lines)


def paper(channels: int, layers: int, gradients: float) -> str:
    """Return what synchronizing takes of each step on many nodes, by the counts and a simple model."""
    lines = []
    for nodes in (1, 2, 8, 64):
        n = nodes * GPUS
        received = 4 * (2 * channels + layers) * n + 4 * 2 * channels * 2 * (n - 1) / n
        waiting = 2 * layers * (IN_NODE + BY_DOUBLING * math.log2(nodes))
        total = 1000 * (waiting + received / RATE)
        hidden = 1000 * 2 * (n - 1) / n * gradients / RATE
        lines.append([str(nodes), str(n), str(2 * layers), f"{received / 1e6:.1f}", f"{total:.1f}", f"{hidden:.1f}"])
    head = [
        "nodes",
        "GPUs",
        "exchanges of norm layers",
        "MB received",
        "ms that the step waits",
        "ms for the gradients",
    ]
    return (
        table(head, lines)
        + f"\nOn paper, nothing measured: ResNet-50, SyncBatchNorm, {GPUS} GPUs a node; an exchange takes "
        f"{IN_NODE * 1e6:.0f} µs in a node and {BY_DOUBLING * 1e6:.0f} µs more for each doubling of the nodes, a GPU "
        f"sends {RATE / 1e9:.0f} GB a second. Gradients are sent while backward goes on; norm layers wait for their "
        "exchange. Frozen layers have none at any size.\n"
    )


def write_report(store: Store) -> str:
    """Write the tables, and return them."""
    text = counts_table(store) + "\n" + times_table(store)
    row = store.find(what="step", variant=SYNC, world=2)
    assert row is not None
    layers = row["calls"]["gather"]
    channels = (row["sent"]["gather"] // 4 - layers) // 2
    on_paper = paper(channels, layers, row["sent"]["gradients"])
    write_atomically(ROOT / "results" / "bench_processes.md", text)
    write_atomically(ROOT / "results" / "bench_processes_paper.md", on_paper)
    store.finish({"layers": layers, "channels": channels})
    return text + "\n" + on_paper


def main() -> None:
    """Count and time, or only write the tables anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report-only", action="store_true", help="write the tables from the rows there are")
    parser.add_argument("--rounds", type=int, default=12, help="steps of each variant that are timed")
    args = parser.parse_args()
    store = Store(ROOT / "results" / "bench_processes.json", "python scripts/bench_processes.py", device="cpu")
    for world in () if args.report_only else WORLDS:
        if store.done({"world": world}):
            continue
        for row in measure(world, args.rounds):
            store.add({"world": world, **row})
        print(f"{world}: done", flush=True)
    print(write_report(store))


if __name__ == "__main__":
    main()
