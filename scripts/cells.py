"""What the training studies share: a learning rate chosen from a ladder, AdamW with warm-up, and worker processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from store import Store, commit
from torch import nn

WARMUP, WEIGHT_DECAY = 0.1, 0.05
MOVED_BY_CHANCE = 2.5  # points: what other seeds and another machine change in the studies of small trainings
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, by degrees of freedom from 1
Cell = dict[str, Any]


def rates_to_try(tried: Mapping[float, float], ladder: Sequence[float], first: Sequence[float]) -> list[float]:
    """Return the rungs that the search has to look at next; none where it is over.

    Args:
        tried: the score of each rate that was tried; higher is better.
        ladder: all rates, ascending.
        first: the rates it starts with; it goes on while a neighbor of the best one was not tried, and of each that is
            as good: rates at which a training collapses all end at the share of the largest class.
    """
    missing = [lr for lr in first if lr not in tried]
    if missing:
        return missing
    near = {i + side for i, lr in enumerate(ladder) if lr in _best(tried) for side in (-1, 1)}
    return [ladder[i] for i in sorted(near) if 0 <= i < len(ladder) and ladder[i] not in tried]


def _best(tried: Mapping[float, float]) -> list[float]:
    top = max(tried.values())
    return [lr for lr, score in tried.items() if score == top]


def chosen_rate(tried: Mapping[float, float], ladder: Sequence[float], first: Sequence[float]) -> float | None:
    """Return the best rate once the search is over; the smallest of those that are as good."""
    return None if rates_to_try(tried, ladder, first) else min(_best(tried))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of 2 to 10 independent values, and the ends of its 95 % interval by Student's t."""
    mean = fmean(values)
    half = STUDENT_T[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def decided(points: float, low: float, high: float, seeds: int) -> bool:
    """Tell whether a difference is one: of three seeds or more, 0 not in its interval, and more than chance moves."""
    return seeds > 2 and low * high > 0 and abs(points) >= MOVED_BY_CHANCE


def gain(differences: Sequence[float]) -> dict[str, Any]:
    """Return by how much something is ahead, from differences taken seed by seed: mean, interval, whether it is one."""
    points, low, high = interval(differences)
    seeds = len(differences)
    return {"points": points, "low": low, "high": high, "seeds": seeds, "decided": decided(points, low, high, seeds)}


def why_undecided(seeds: int) -> str:
    """Return what stands behind a difference that is none; two seeds that happen to agree make an interval tiny."""
    return ": undecided" if seeds > 2 else ": two seeds"


def adamw(
    net: nn.Module, lr: float, steps: int, others: Iterable[Mapping[str, Any]] = ()
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW, vectors without weight decay, and its schedule: linear warm-up, then a cosine down to 0.

    Args:
        net: what is trained.
        lr: peak learning rate.
        steps: length of the schedule.
        others: more parameter groups.
    """
    optimizer = torch.optim.AdamW([*groups(net), *others], lr=lr, fused=True)
    return optimizer, warm_cosine(optimizer, steps)


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """Return the parameter groups of what is trained: matrices and kernels with weight decay, vectors without."""
    trained = [p for p in net.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def warm_cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = WARMUP
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule: linear warm-up over a share of the steps, then a cosine down to 0."""
    warm = max(1, round(warmup * steps))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (s + 1) / warm if s < warm else (1 + math.cos(math.pi * (s - warm) / max(1, steps - warm))) / 2,
    )


def run(
    store: Store,
    next_cells: Callable[[Store], Iterator[Cell]],
    measure: Callable[..., Cell],
    workers: int,
    score: str,
) -> None:
    """Measure until nothing is left, with a worker a core; each result is on disk before the next one starts.

    Args:
        store: where the rows go.
        next_cells: yields the cells that can be measured now, most important first; more appear with the results.
        measure: takes the entries of a cell and returns its figures, in a worker process.
        workers: number of processes, one thread each.
        score: the figure that the progress bar shows.
    """
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    pending: dict[str, Any] = {}
    code = {"commit": commit()}  # what the workers import, now
    last = TextColumn("{task.fields[last]}")
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), last)
    with multiprocessing.get_context("spawn").Pool(workers, _end_with_parent) as pool, Progress(*columns) as progress:
        bar = progress.add_task("cells", total=None, last="")
        while True:
            for name in [name for name, job in pending.items() if job.ready()]:
                row = pending.pop(name).get()
                store.add(row | code)
                told = f"{name}: {row[score]:.1f} %, {row['seconds']:.0f} s"
                progress.update(bar, completed=len(store.rows), last=told)
            for key in next_cells(store):
                if len(pending) >= workers:
                    break
                name = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in key.values())
                if name not in pending:
                    pending[name] = pool.apply_async(_work, (measure, key))
            if not pending:
                return
            next(iter(pending.values())).wait(1.0)


def _end_with_parent() -> None:
    """Let a worker end when the study is killed; it would go on computing for nobody."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(measure: Callable[..., Cell], key: Cell) -> Cell:
    torch.set_num_threads(1)
    return key | measure(**key)
