"""What BatchNormMonitor costs at its default interval, as a share of the training time.

Each cell trains a network for a few steps in a Trainer with a CSV logger and takes the time that the monitor's hooks
take: of a batch of which images are kept, of a look, of the leakage test; the share follows from how often each comes
by default. Medians over the looks of one process. On a CPU it is the CPU time of one thread, which other programs on
the machine do not change; on a GPU the wall time. Result: results/bench_monitor.{json,md}; some minutes on a CPU.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from rich.progress import track
from store import Store
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import finetune_bn as fbn
from finetune_bn.callbacks.conversion import BatchNormConversion
from finetune_bn.callbacks.monitor import BatchNormMonitor
from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
POLICIES: dict[str, fbn.Policy] = {"live": fbn.Keep(), "frozen": fbn.Freeze()}
ON_CPU = [("tf_efficientnet_lite0", 64, 8), ("tf_efficientnet_lite0", 64, 32), ("resnet50", 96, 16)]
ON_GPU = [("tf_efficientnet_lite0", 224, 64), ("resnet50", 224, 32), ("resnet50", 224, 128)]
INTERVAL, LOOKS, CLASSES = 12, 9, 10  # images of 12 batches are kept for each look, by default too


class Network(pl.LightningModule):
    """A timm network that learns random labels."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = timm.create_model(name, num_classes=CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class TimedMonitor(BatchNormMonitor):
    """A monitor that takes the time of its hooks, and of the training between them."""

    def __init__(self, device: str) -> None:
        super().__init__(every_n_steps=INTERVAL, leakage_every_n_looks=2)
        self.device = device
        self.times: dict[str, list[float]] = {"step": [], "keep": [], "look": [], "look with leakage": []}
        self._left = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        begun = now(self.device)
        super().on_train_batch_start(trainer, pl_module, *args)
        self._before = now(self.device) - begun
        self._left = now(self.device)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        begun, look = now(self.device), self.look
        self.times["step"].append(begun - self._left)
        super().on_train_batch_end(trainer, pl_module, *args)
        kind = "keep"
        if self.look is not look and self.look is not None:
            kind = "look" if self.look.leakage is None else "look with leakage"
        self.times[kind].append(now(self.device) - begun + self._before)


def now(device: str) -> float:
    """Return the time that counts on a device, in seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(net: str, pixels: int, batch: int, policy: str, device: str) -> dict[str, Any]:
    """Return the times of one cell in milliseconds, and what the monitor costs by default."""
    torch.manual_seed(0)
    steps = LOOKS * INTERVAL
    data = TensorDataset(torch.randn(steps * batch, 3, pixels, pixels), torch.randint(CLASSES, (steps * batch,)))
    monitor = TimedMonitor(device)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=1, accelerator=device, devices=1, callbacks=[BatchNormConversion(POLICIES[policy]), monitor],
            logger=CSVLogger(folder), enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, precision="32-true" if device == "cpu" else "bf16-mixed",
        )  # fmt: skip
        trainer.fit(Network(net), DataLoader(data, batch))
    assert "error" not in monitor.causes, monitor.causes
    # The first steps and the first look load code and fill caches.
    step, keep, look, leak = (1000 * statistics.median(times[1:]) for times in monitor.times.values())
    defaults = {name: p.default for name, p in inspect.signature(BatchNormMonitor).parameters.items()}
    every, looks = defaults["every_n_steps"], defaults["leakage_every_n_looks"]
    share = ((INTERVAL - 1) * keep + look + (leak - look) / looks) / (every * step)
    return {
        "net": net, "pixels": pixels, "batch": batch, "policy": policy, "every_n_steps": every,
        "step_ms": step, "keep_ms": keep, "look_ms": look, "look_with_leakage_ms": leak, "share": share,
    }  # fmt: skip


def main() -> None:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the networks are trained")
    device = parser.parse_args().device
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    path = ROOT / "results" / f"bench_monitor{'_gpu' if device == 'cuda' else ''}.json"
    command = f"python scripts/bench_monitor.py{' --device cuda' if device == 'cuda' else ''}"
    store = Store(path, command, [0], device=device)
    settings = ON_CPU if device == "cpu" else ON_GPU
    cells = [dict(zip(("net", "pixels", "batch"), s, strict=True)) | {"policy": p} for s in settings for p in POLICIES]
    for cell in track(cells, description="monitor"):
        if not store.done(cell):
            store.add(measure(**cell, device=device))
    rows = [row for cell in cells if (row := store.find(**cell))]
    lines = [
        "| network, pixels, batch | BatchNorm | kept batch | look | with leakage test | of training time |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = " | ".join(
            f"{row[name] / row['step_ms']:.2f}" for name in ("keep_ms", "look_ms", "look_with_leakage_ms")
        )
        what = f"{row['net']}, {row['pixels']}, {row['batch']}"
        lines.append(f"| {what} | {row['policy']} | {times} | {100 * row['share']:.2f} % |")
    store.finish({"largest_share": max(row["share"] for row in rows), "every_n_steps": rows[0]["every_n_steps"]})
    text = "\n".join([*lines, "", "Kept batch and looks in steps, besides the step itself."]) + "\n"
    write_atomically(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
