"""Shifted data: the source's statistics against those of the target, re-estimated in several ways.

EfficientNet-Lite0 with its ImageNet weights is fine-tuned, BatchNorm frozen, on the emoji of one vendor (9 categories,
1,204 images of 64 pixels, 5 epochs); then its BatchNorm layers get the vendor's own statistics with the function
preserved, for it worked by ImageNet's until then. Accuracy on emoji that were not trained on: in the drawings of the
two other vendors, and in those of the source vendor under five corruptions at five severities (corruptions.py).

Arms: the source's statistics; those of each test batch (8, 32 or 128 images); recalibrated on n unlabeled images of
the target, of emoji that were trained on, with the source's statistics as a prior worth N images; the same without the
step that preserves the function ("unprepared"); a mixture of domains recalibrated as one, or a domain at a time
(StatisticsBank), from the same 1,024 images; frozen with the source's or the target's statistics and fine-tuned on a
few labeled target images, five learning rates each, the best by validation emoji. Three seeds; a seed sets the split,
the head and all orders.

Hardware: 2 CPU cores, shared with other work: about 50 minutes. Resumes where it was cut off; the source networks are
kept in runs/study_shift. Result: results/study_shift.json, study_shift*.md and study_shift_*.png.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from corruptions import SEVERITIES, STRENGTHS, corrupt
from store import Store
from study_shift_report import (
    LABELS,
    MAIN,
    MIXED_IMAGES,
    MIXTURES,
    OTHERS,
    PRIORS,
    SIZES,
    TEST_BATCHES,
    USUAL_SIZE,
    write_report,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import finetune_bn as fbn
from finetune_bn.recalibration.bank import StatisticsBank

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "runs" / "study_shift"
SEEDS = (0, 1, 2)
SOURCE = "noto"
SHIFTS = (*MAIN, *((kind, severity) for kind in STRENGTHS for severity in SEVERITIES if severity != 5))
RATES, TUNE_EPOCHS = (3e-5, 1e-4, 2e-4, 1e-5, 5e-4), 3
TRAINING = {"network": "tf_efficientnet_lite0", "vendor": SOURCE, "epochs": 5, "lr": 2e-4, "batch": 16}
WARMUP, WEIGHT_DECAY = 0.1, 0.05
RECIPE = hashlib.sha256(json.dumps([TRAINING, WARMUP, WEIGHT_DECAY]).encode()).hexdigest()[:6]

Key = dict[str, Any]


@cache
def drawings(seed: int) -> dict[tuple[str, str], tuple[Tensor, Tensor, list[int]]]:
    """Return (uint8 images [N, 3, 64, 64], labels, numbers in the data set) by split and vendor."""
    import numpy as np

    from finetune_bn.data import EmojiData

    data = EmojiData(target="category", seed=seed, mean=(0.5,) * 3, std=(0.5,) * 3)
    found = {}
    for split in ("train", "val", "test"):
        for vendor in (SOURCE, *OTHERS):
            chosen = data.image_set(split, domain=vendor)
            pixels = np.stack([np.asarray(chosen.source.read(index)) for index in chosen.indices])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
            found[split, vendor] = images, chosen.labels, chosen.indices
    return found


def images(seed: int, split: str, shift: str, severity: int) -> tuple[Tensor, Tensor]:
    """Return (inputs of the network, labels) of a split under a shift; training images in the seed's order."""
    pixels, labels, indices = drawings(seed)[split, shift if shift in OTHERS else SOURCE]
    x = pixels.float() / 255
    if shift in STRENGTHS:
        x = corrupt(x, shift, severity, indices)
    x = ((x - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)
    if split == "val":
        return x, labels
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order], labels[order]


def fit(net: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float, seed: int) -> None:
    """Train with AdamW, warm-up and cosine."""
    batch = int(TRAINING["batch"])
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    steps = epochs * math.ceil(len(x) / batch)
    warm = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (s + 1) / warm if s < warm else (1 + math.cos(math.pi * (s - warm) / max(1, steps - warm))) / 2,
    )
    order = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(batch):
            loss = F.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()


def build() -> nn.Module:
    from finetune_bn.backbones.create import create_backbone

    net = create_backbone(str(TRAINING["network"]), "package", num_classes=9)
    return net.to(memory_format=torch.channels_last).eval()


def cache_file(seed: int) -> Path:
    return CACHE / f"{RECIPE}-seed{seed}.pt"


def make_source(seed: int) -> str:
    """Train the source network of a seed, unless it is there, and return a name for its weights."""
    torch.set_num_threads(1)
    path = cache_file(seed)
    if not path.exists():
        torch.manual_seed(seed)
        x, y = images(seed, "train", "none", 0)
        net = fbn.convert(build(), fbn.Freeze("original"), verify=False)
        fit(net, x, y, int(TRAINING["epochs"]), float(TRAINING["lr"]), seed)
        unprepared = copy.deepcopy(net.state_dict())
        fbn.recalibrate(net, x.split(64), how="preserve", progress=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        torch.save({"unprepared": unprepared, "prepared": net.state_dict()}, temporary)
        temporary.replace(path)
    states = torch.load(path, weights_only=True)
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in states["prepared"].values()))
    return f"{RECIPE}-{digest.hexdigest()[:8]}"


@cache
def source(seed: int, state: str = "prepared") -> nn.Module:
    """Return the source network with live BatchNorm in eval mode. Copy it before it is changed."""
    net = build()
    net.load_state_dict(torch.load(cache_file(seed), weights_only=True)[state])
    return net


def by_batch(net: nn.Module) -> nn.Module:
    """Return a copy whose BatchNorm layers normalize each batch by itself, all else in eval mode."""
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.train()
            module.momentum = 0.0
    return net


@torch.inference_mode()
def hits(net: nn.Module, x: Tensor, y: Tensor, batch: int = 64) -> Tensor:
    """Return 1 for each image that is classified correctly, else 0."""
    outputs = torch.cat([net(part) for part in x.split(batch)])
    return (outputs.argmax(1) == y).double()


def percent(correct: Tensor) -> float:
    return round(100 * correct.mean().item(), 4)


def recalibrated(net: nn.Module, x: Tensor, **options: Any) -> tuple[nn.Module, fbn.Recalibration]:
    """Return a copy with the statistics of `x`; warnings are in the record."""
    net = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mode = "auto" if options.get("how") == "preserve" else "exact"
        return net, fbn.recalibrate(net, x.split(64), mode=mode, progress=False, **options)


def keys_under_shift(seed: int, shift: str, severity: int) -> Iterator[Key]:
    """Yield what is measured under a shift without labels; all sizes and priors only for the main ones."""
    common = {"part": "shift", "seed": seed, "shift": shift, "severity": severity}
    main = (shift, severity) in MAIN
    yield common | {"arm": "source"}
    yield from (common | {"arm": "batch", "n": n} for n in TEST_BATCHES)
    sizes, priors = (SIZES, PRIORS) if main else ((USUAL_SIZE,), (0,))
    yield from (common | {"arm": "recalibrated", "n": n, "prior": prior} for n in sizes for prior in priors)
    if main:
        yield common | {"arm": "unprepared", "n": USUAL_SIZE, "prior": 0}


def measure_under_shift(keys: list[Key], seed: int, shift: str, severity: int) -> Iterator[Key]:
    x, y = images(seed, "test", shift, severity)
    target, _ = images(seed, "train", shift, severity)
    net = source(seed)
    for key in keys:
        if key["arm"] == "source":
            # What the shift does to the activations as the source network computes them.
            _, seen = recalibrated(net, target[:USUAL_SIZE], how="preserve")
            yield key | {"accuracy": percent(hits(net, x, y)), **what_moved(seen)}
        elif key["arm"] == "batch":
            yield key | {"accuracy": percent(hits(by_batch(net), x, y, key["n"]))}
        else:
            start = net if key["arm"] == "recalibrated" else source(seed, "unprepared")
            adapted, record = recalibrated(start, target[: key["n"]], prior=key["prior"])
            yield key | {"accuracy": percent(hits(adapted, x, y)), **noted(record)}


def what_moved(record: fbn.Recalibration) -> Key:
    """Return how far the activations moved, in the median layer.

    Channels that hardly vary for the source move by hundreds of their sd, and would decide every mean.
    """
    figures = {"moved_by": "shift", "var_ratio": "var_ratio", "standard_error": "standard_error"}
    return {name: round(median(getattr(row, of) for row in record.rows), 5) for name, of in figures.items()}


def noted(record: fbn.Recalibration) -> Key:
    return {"warnings": list(record.warnings)} if record.warnings else {}


def keys_of_mixture(seed: int, mixture: str) -> Iterator[Key]:
    for shift, severity in MIXTURES[mixture]:
        for arm in ("source", "batch", "pooled", "bank"):
            common = {"part": "mixed", "mixture": mixture, "seed": seed, "shift": shift, "severity": severity}
            yield common | {"arm": arm, "n": max(TEST_BATCHES) if arm == "batch" else MIXED_IMAGES}


def measure_mixture(keys: list[Key], seed: int, mixture: str) -> Iterator[Key]:
    domains, net = MIXTURES[mixture], copy.deepcopy(source(seed))
    share = MIXED_IMAGES // len(domains)
    # No emoji is in the share of two domains: a mixture shows each in one drawing.
    parts = [images(seed, "train", *domain)[0][i * share :][:share] for i, domain in enumerate(domains)]
    tests = [images(seed, "test", *domain) for domain in domains]
    generator = torch.Generator().manual_seed(seed)
    together = torch.cat(parts)
    pooled, _ = recalibrated(net, together[torch.randperm(len(together), generator=generator)])
    bank = StatisticsBank()
    for domain, part in zip(domains, parts, strict=True):
        bank.keep(str(domain), recalibrated(net, part)[0])
    x, y = torch.cat([x for x, _ in tests]), torch.cat([y for _, y in tests])
    shuffled = torch.randperm(len(x), generator=generator)
    in_batches = torch.empty(len(x), dtype=torch.float64)
    in_batches[shuffled] = hits(by_batch(net), x[shuffled], y[shuffled], max(TEST_BATCHES))
    by_domain = dict(zip(domains, in_batches.split([len(y) for _, y in tests]), strict=True))
    inputs = dict(zip(domains, tests, strict=True))
    for key in keys:
        domain = (key["shift"], key["severity"])
        if key["arm"] == "batch":
            correct = by_domain[domain]
        elif key["arm"] == "bank":
            with bank.using(str(domain), net):
                correct = hits(net, *inputs[domain])
        else:
            correct = hits(net if key["arm"] == "source" else pooled, *inputs[domain])
        yield key | {"accuracy": percent(correct)}


def keys_of_tuning(seed: int, shift: str, severity: int) -> Iterator[Key]:
    common = {"part": "tuned", "seed": seed, "shift": shift, "severity": severity}
    for arm in ("source", "recalibrated"):
        yield from (common | {"arm": arm, "labels": labels, "lr": lr} for labels in LABELS for lr in RATES)


def measure_tuning(keys: list[Key], seed: int, shift: str, severity: int) -> Iterator[Key]:
    x, y = images(seed, "train", shift, severity)
    splits = {split: images(seed, split, shift, severity) for split in ("val", "test")}
    starts = {"source": source(seed), "recalibrated": recalibrated(source(seed), x[:USUAL_SIZE])[0]}
    for key in keys:
        net = fbn.convert(copy.deepcopy(starts[key["arm"]]), fbn.Freeze("original"), verify=False)
        labels = key["labels"]
        torch.manual_seed(seed)
        fit(net, x[:labels], y[:labels], TUNE_EPOCHS, key["lr"], seed)
        figures = {name: percent(hits(net, *split)) for name, split in splits.items()}
        yield key | {"val_accuracy": figures["val"], "accuracy": figures["test"]}


PARTS: dict[str, tuple[Callable[..., Iterator[Key]], Callable[..., Iterator[Key]]]] = {
    "shift": (keys_under_shift, measure_under_shift),
    "mixed": (keys_of_mixture, measure_mixture),
    "tuned": (keys_of_tuning, measure_tuning),
}
# Part, its arguments, and the cells to measure.
Task = tuple[str, tuple[Any, ...], list[Key]]


def tasks(seeds: tuple[int, ...] = SEEDS) -> list[Task]:
    """Return all there is to measure, most important first."""
    plan: list[tuple[str, tuple[Any, ...]]] = [
        *(("shift", (seed, *shift)) for seed in seeds for shift in MAIN),
        *(("mixed", (seed, mixture)) for seed in seeds for mixture in MIXTURES),
        *(("tuned", (seed, *shift)) for seed in seeds for shift in MAIN[1:]),
        *(("shift", (seed, *shift)) for seed in seeds for shift in SHIFTS[len(MAIN) :]),
    ]
    return [(part, arguments, list(PARTS[part][0](*arguments))) for part, arguments in plan]


def left(store: Store) -> list[Task]:
    """Return the tasks with the cells that the store does not have."""
    missing = [(part, arguments, [key for key in keys if not store.done(key)]) for part, arguments, keys in tasks()]
    return [task for task in missing if task[2]]


def work(task: Task) -> list[Key]:
    """Measure the cells of a task in a worker process."""
    torch.set_num_threads(1)
    part, arguments, keys = task
    return list(PARTS[part][1](keys, *arguments))


def drop_stale(store: Store, names: dict[int, str]) -> int:
    """Remove rows measured on other source networks than these, by seed; return how many there were."""
    stale = [r for r in store.rows if r["seed"] in names and r.get("source") != names[r["seed"]]]
    return sum(store.drop(row) for row in stale)


def run(store: Store, workers: int) -> None:
    """Measure what is missing; the rows of a task are on disk before its worker takes another."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    # A recipe that was changed makes all rows stale; one that was not, those of weights that are gone.
    foreign = {row["seed"] for row in store.rows if not str(row.get("source")).startswith(RECIPE)}
    seeds = sorted(foreign | {arguments[0] for _, arguments, _ in left(store)})
    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
    )
    with multiprocessing.get_context("spawn").Pool(workers) as pool, Progress(*columns) as progress:
        bar = progress.add_task("source networks", total=len(seeds), last="")
        names = {}
        for seed, name in zip(seeds, pool.imap(make_source, seeds), strict=True):
            names[seed] = name
            progress.advance(bar)
        if dropped := drop_stale(store, names):
            progress.console.print(f"{dropped} rows were measured on other source networks: measured again")
        missing = left(store)
        bar = progress.add_task("shifts", total=len(missing), last="")
        for task, rows in zip(missing, pool.imap(work, missing), strict=True):
            for row in rows:
                store.add(row | {"source": names[row["seed"]]})
            progress.update(bar, advance=1, last=" ".join(map(str, (task[0], *task[1]))))


def main() -> None:
    """Run the study, or only write its tables anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--report-only", action="store_true", help="write tables and plots from the rows there are")
    args = parser.parse_args()
    path = ROOT / "results" / "study_shift.json"
    store = Store(path, "python scripts/study_shift.py", SEEDS, device="cpu")
    if not args.report_only:
        run(store, args.workers)
    print(write_report(store))


if __name__ == "__main__":
    main()
