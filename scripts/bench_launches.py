"""Operators that a training step launches, and time on the host, by what was done to the BatchNorm layers.

With small batches a GPU waits for launches and Python, so these decide there; and their number depends on no machine.
Counted by a dispatch mode (views, empties and detaches left out), forward, backward and optimizer step (AdamW, foreach)
apart, for every variant of bench_step.py, in float32 and under bfloat16 autocast. Then the time of a step on the host:
the same network with a 64th of the channels, so that next to no arithmetic is left, per norm layer over the net without
norm layers, variants in turn in one process, medians. With a GPU also kernels and the share of time without one, from
the profiler. Result: results/bench_launches.json with a table beside it (bench_launches_cuda on a GPU); five minutes on
a CPU core. Cells that the file holds are not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from launches import kernels_of, launches_of
from step_variants import (
    EVAL,
    FLOOR,
    INDUCTOR,
    LIVE,
    SHORT,
    TIMM,
    TORCHVISION,
    TUNE,
    base_network,
    build,
    ours,
)
from store import Store
from torch import Tensor, nn
from torch.nn import functional as F

import finetune_bn as fbn
from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
COUNTED = [name for name in SHORT if name != INDUCTOR]  # that one is nothing without a compiler
LIMITED = "ours, none, fold=auto, with StepLimit"
PRECISIONS = ("fp32", "bf16 autocast")


class Step:
    """A training step of one network in parts.

    Args:
        model: the network.
        x: images [N, 3, H, W].
        bf16: whether it runs under bfloat16 autocast.
        limited: whether the optimizer's steps are limited.
    """

    def __init__(self, model: nn.Module, x: Tensor, bf16: bool, limited: bool = False) -> None:
        self.model, self.x, self.bf16 = model, x, bf16
        self.y = torch.arange(len(x), device=x.device) % 10
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, foreach=True)
        if limited:
            fbn.limit_steps(self.optimizer, model)

    def forward(self) -> Tensor:
        """Return the loss."""
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.bf16):
            return F.cross_entropy(self.model(self.x).float(), self.y)

    def run(self) -> None:
        """Forward, backward, and no gradient left."""
        self.forward().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def counts(self) -> dict[str, int]:
        """Return the launches of the three parts, of a step after the first."""
        self.run()
        forward, loss = launches_of(self.forward)
        backward, _ = launches_of(loss.backward)
        self.optimizer.step()  # makes its state
        optimizer, _ = launches_of(self.optimizer.step)
        self.optimizer.zero_grad(set_to_none=True)
        return {"forward": forward, "backward": backward, "optimizer": optimizer}

    def kernels(self) -> dict[str, float]:
        """Return the kernels of a step on a GPU, and the share of its time in which none ran."""
        self.run()
        return kernels_of(self.run)


def count(store: Store, net: str, size: int, batch: int, device: str) -> None:
    """Add the counts of every variant that the file does not hold."""
    base, x = base_network(net, size), torch.randn(batch, 3, size, size)
    for precision in PRECISIONS:
        for variant in [*COUNTED, LIMITED]:
            cell = {"what": "launches", "net": net, "size": size, "batch": batch, "precision": precision}
            cell["variant"] = variant
            if store.done(cell):
                continue
            model = build(variant.removesuffix(", with StepLimit"), base, x).to(device)
            step = Step(model, x.to(device), precision != "fp32", variant == LIMITED)
            row: dict[str, Any] = step.counts()
            if device == "cuda":
                row |= step.kernels()
            store.add(cell | row)
            print(cell, row)


def host_time(store: Store, rounds: int) -> None:
    """Add the time on the host of every variant of the narrow network: microseconds of a norm layer over the floor."""
    size, batch = 32, 2
    base, x = base_network("resnet50", size, narrow=64), torch.randn(batch, 3, size, size)
    layers = sum(isinstance(module, nn.BatchNorm2d) for module in base.modules())
    for precision in PRECISIONS:
        cell = {"what": "host", "net": "resnet50, a 64th of the channels", "size": size, "batch": batch}
        cell |= {"precision": precision}
        if store.done(cell | {"variant": FLOOR}):
            continue
        steps = {name: Step(build(name, base, x), x, precision != "fp32") for name in HOST}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(rounds + 3):
            for name, step in steps.items():
                begin = time.process_time()
                step.run()
                if turn >= 3:
                    times[name].append(time.process_time() - begin)
        for name, seconds in times.items():
            over = [(a - b) / layers * 1e6 for a, b in zip(seconds, times[FLOOR], strict=True)]
            ratio = [a / b for a, b in zip(seconds, times[FLOOR], strict=True)]
            row = {"microseconds_over_floor": statistics.median(over), "ratio": statistics.median(ratio)}
            store.add(cell | {"variant": name, "rounds": rounds} | row)


HOST = [LIVE, EVAL, TUNE, TORCHVISION, TIMM, ours("none", "auto")]
HOST += [ours("original", fold) for fold in ("never", "always")]
HOST += [ours("merged", "always"), FLOOR]


def table(store: Store, net: str, size: int, batch: int) -> str:
    """Return the tables as Markdown."""
    lines = [f"Operators launched in a training step: {net}, {size} px, batch {batch}; AdamW (foreach).", ""]
    lines += ["| variant | precision | forward | backward | both, of live | optimizer |", "|---|---|---|---|---|---|"]
    for precision in PRECISIONS:
        cell = {"what": "launches", "net": net, "size": size, "batch": batch, "precision": precision}
        found = {name: store.find(**cell, variant=name) for name in [*COUNTED, LIMITED]}
        live = found[LIVE]
        for name, row in found.items():
            if row and live:
                share = (row["forward"] + row["backward"]) / (live["forward"] + live["backward"])
                figures = f"{row['forward']} | {row['backward']} | {share:.3f} | {row['optimizer']}"
                lines.append(f"| {name} | {precision} | {figures} |")
    lines += [
        "",
        "Time on the host, the same net with a 64th of the channels, 32 px, batch 2, one CPU core: what a norm layer "
        "costs over the net without norm layers, of what a live layer costs; and the whole step, of that net's.",
        "",
        "| variant | precision | of live | step, of the floor |",
        "|---|---|---|---|",
    ]
    for precision in PRECISIONS:
        rows = [row for row in store.rows if row["what"] == "host" and row["precision"] == precision]
        live_row = next((row for row in rows if row["variant"] == LIVE), None)
        for row in rows:
            of_live = row["microseconds_over_floor"] / live_row["microseconds_over_floor"] if live_row else 0.0
            lines.append(f"| {row['variant']} | {precision} | {of_live:.2f} | {row['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet50", help="a timm name")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=4, help="images in a batch")
    parser.add_argument("--rounds", type=int, default=41, help="rounds of the time on the host")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = "bench_launches" if args.device == "cpu" else "bench_launches_cuda"
    store = Store(
        ROOT / "results" / f"{name}.json",
        f"python scripts/bench_launches.py --device {args.device}",
        device=args.device,
    )
    count(store, args.net, args.size, args.batch, args.device)
    if args.device == "cpu":
        host_time(store, args.rounds)
    text = table(store, args.net, args.size, args.batch)
    write_atomically(ROOT / "results" / f"{name}.md", text)
    summary = {
        f"{row['variant']}, {row['precision']}": row["forward"] + row["backward"]
        for row in store.rows
        if row["what"] == "launches"
    }
    store.finish(summary)
    print(text)


if __name__ == "__main__":
    main()
