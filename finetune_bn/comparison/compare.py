"""Compare treatments of BatchNorm by short fine-tunes from the same weights, seeds and order of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from finetune_bn.comparison.arms import Arm, check_layers, checked_arms
from finetune_bn.comparison.feed import Feed, as_batches, count, one_by_one
from finetune_bn.comparison.result import ArmResult, Comparison, Run
from finetune_bn.comparison.running import MOST_STEPS, run_comparison
from finetune_bn.comparison.scoring import first_batches, predictor, scoring, supervised
from finetune_bn.comparison.store import fingerprint
from finetune_bn.comparison.training import MakeOptimizer, Workbench, adamw
from finetune_bn.conversion.policies import Policy
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.batch_size import count_images
from finetune_bn.utilities.batches import Forward
from finetune_bn.utilities.checks import number
from finetune_bn.utilities.probe import unwrapped

__all__ = ["ArmResult", "Comparison", "Run", "compare"]

RATES = (1e-4, 3e-4, 1e-3)
VAL_BATCH = 64


def compare(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    arms: Iterable[str | Arm] | Mapping[str, Policy | Arm] | None = None,
    rates: Sequence[float] | Mapping[str, Sequence[float]] = RATES,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    seconds: float | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    metric: Callable[[Tensor, Tensor], float | Tensor] | None = None,
    optimizer: MakeOptimizer | None = None,
    forward: Forward | None = None,
    batch_size: int | None = None,
    images: Iterable[Any] | None = None,
    extend: bool = True,
    folder: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Fine-tune `model` for a short time under several treatments of its BatchNorm layers, and tell which was best.

    Each training starts from the weights of `model` and sees the same images in the same order, augmented alike, for
    all treatments: what a loader draws depends on seed and epoch alone. Each treatment has its own learning rates;
    where the best is at the edge of those, the grid grows. Pairs of treatment and rate that do badly in short
    trainings are dropped by successive halving: the best third of them is trained three times as long, anew. The first
    seed chooses; the longest trainings are run with all seeds, and their mean is the score. `model` stays as it is.

    Treatments that diverge, or that the model refuses, are in the table with the reason. Scores are those of the
    validation images that chose the rates: they flatter a little, all treatments alike.

    Args:
        model: any module with BatchNorm layers and the head that it is to be trained with. It is copied.
        train: a DataLoader, a list of batches (inputs, targets), or a pair of tensors (inputs [N, ...], targets [N]).
        val: the same, of the images that decide.
        arms: names out of `ARMS` (live, none, original, limited, scheduled, recalibrated, group_norm, affine), or own
            treatments as `{name: policy}`. None: all.
        rates: peak learning rates to begin with, for all treatments or as `{name: rates}`.
        seeds: they decide order, dropout and augmentation.
        steps: length of the longest training. Default: three epochs, where neither this nor `seconds` is given.
        seconds: about how long the whole comparison may take; the length follows from a few timed steps.
        loss: `(outputs, targets)` returns the loss. Default: cross-entropy.
        metric: `(outputs, targets)` of all validation images returns the score, higher is better. Default: the
            accuracy where the loss is the default one, else the negative validation loss.
        optimizer: `(model, lr, steps)` returns an optimizer and a schedule that is stepped after each step, or None.
            Default: AdamW with warm-up over a tenth of the steps and a cosine down to 0.
        forward: `(model, batch)` passes a batch to the model; None takes the first tensor of a tuple or list, and of
            a dict what `model.forward` takes.
        batch_size: images of a training batch, where `train` is a pair of tensors.
        images: training images drawn one by one, for treatments that measure statistics. Default: those of the data
            set of `train`, shuffled.
        extend: whether grids grow.
        folder: where finished trainings are kept, so that a comparison that was cut off goes on: the same call returns
            the same result. None: nowhere.
        device: where trainings run; None: where the model is.
        progress: show a table as it fills; None: on a terminal.

    Returns:
        The runs and the table of the treatments.

    Raises:
        FinetuneBNError: an argument, the model or the data cannot be used, `seconds` are too few, or `folder` holds
            another comparison.
        NoBatchNormMatched: the model has no BatchNorm layer.
    """
    model = unwrapped(model)
    check_layers(model)
    chosen = checked_arms(arms)
    for name, function in (("loss", loss), ("metric", metric), ("optimizer", optimizer), ("forward", forward)):
        if function is not None and not callable(function):
            raise FinetuneBNError(complaint(name, function, "a function, or None"))
    if batch_size is not None:
        batch_size = number("batch_size", batch_size, least=1, whole=True)
    like = next((t for t in (*model.parameters(), *model.buffers())), torch.empty(0))
    where = like.device if device is None else torch.device(device)

    def moved(batch: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.to(where, non_blocking=True), batch)

    batches = as_batches(train, "train", batch_size, training=True)
    train_feed = Feed(batches, "train", moved)
    val_feed = Feed(as_batches(val, "val", batch_size or VAL_BATCH, training=False), "val", moved)
    predict = predictor(model, forward, where)
    objective = F.cross_entropy if loss is None else loss
    name, score = scoring(val_feed, predict, objective, metric, default=loss is None)
    bench = Workbench(
        model,
        train_feed,
        supervised(predict, objective),
        score,
        adamw if optimizer is None else optimizer,
        one_by_one(batches) if images is None else images,
        forward=forward,
        device=where,
    )
    try:
        first, checked = first_batches(bench, val_feed, seeds)
        if forward is None and isinstance(first, (tuple, list)) and isinstance(first[0], Tensor):
            bench.example = first[0][:1].to(like.device)
        return run_comparison(
            bench,
            chosen,
            _checked_rates(rates, chosen),
            seeds,
            steps=steps,
            seconds=seconds,
            metric=name,
            sizes=(count_images(first).images, checked),
            data=fingerprint([first, next(val_feed.epoch(0, 0)), count(batches, MOST_STEPS), checked]),
            functions=[_name(function) for function in (loss, metric, optimizer, forward)],
            extend=extend,
            folder=folder,
            progress=progress,
        )
    finally:
        train_feed.leave()
        val_feed.leave()


def _checked_rates(
    rates: Sequence[float] | Mapping[str, Sequence[float]], arms: Mapping[str, Arm]
) -> dict[str, list[float]]:
    if isinstance(rates, Mapping):
        other = sorted(set(rates) ^ set(arms))
        if other:
            raise FinetuneBNError(complaint("rates", other, f"learning rates for each of {', '.join(arms)}"))
        named = {name: rates[name] for name in arms}
    else:
        named = dict.fromkeys(arms, rates)
    found = {}
    for name, values in named.items():
        if isinstance(values, (str, int, float)) or not len(list(values)):
            raise FinetuneBNError(complaint("rates", values, "one or more learning rates"))
        checked = sorted({float(number("rates", value, above=0, below=math.inf)) for value in values})
        found[name] = checked
    return found


def _name(function: Any) -> str:
    if function is None:
        return ""
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"
