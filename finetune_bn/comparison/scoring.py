"""How a batch becomes a loss, and the validation batches a score; both are tried before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from finetune_bn.comparison.feed import Feed
from finetune_bn.comparison.training import Workbench
from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.utilities.batch_size import count_images
from finetune_bn.utilities.batches import Feeder, Forward
from finetune_bn.utilities.probe import quietly


def supervised(
    predict: Callable[[nn.Module, Any], Any], loss: Callable[[Any, Any], Tensor]
) -> Callable[[nn.Module, Any], Tensor]:
    """Return `(model, batch)` that passes a batch (inputs, targets) through the model and returns the loss."""

    def of_batch(net: nn.Module, batch: Any) -> Tensor:
        return loss(predict(net, batch), targets_of(batch))

    return of_batch


def predictor(model: nn.Module, forward: Forward | None, device: torch.device) -> Callable[[nn.Module, Any], Any]:
    """Return `(model, batch)` that passes a batch to a copy of the model as `recalibrate` would."""
    if forward is not None:
        return forward
    feeder = Feeder(model, None, device)

    def predict(net: nn.Module, batch: Any) -> Any:
        args, kwargs = feeder.chunk(batch, 0).content
        return net(*args, **kwargs)

    return predict


def targets_of(batch: Any) -> Any:
    """Return the second part of a batch, or what a dict calls its labels.

    Raises:
        FinetuneBNError: the batch has none.
    """
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[1]
    if isinstance(batch, dict):
        for name in ("labels", "label", "targets", "target", "y"):
            if name in batch:
                return batch[name]
    allowed = "batches (inputs, targets), or dicts with labels"
    remedy = "Pass step=lambda model, batch: ..., which returns the loss of a batch."
    raise FinetuneBNError(complaint("train", type(batch).__name__, allowed, remedy))


def scoring(
    val: Feed,
    predict: Callable[[nn.Module, Any], Any],
    loss: Callable[[Any, Any], Tensor],
    metric: Callable[[Tensor, Tensor], float | Tensor] | None,
    *,
    default: bool,
) -> tuple[str, Callable[[nn.Module], float]]:
    """Return what the score is called, and the function that computes it over all validation batches."""

    def accuracy(model: nn.Module) -> float:
        hits = images = 0
        for batch in val.epoch(0, 0):
            outputs, targets = predict(model, batch), targets_of(batch)
            if not bool(torch.isfinite(outputs).all()):
                return math.nan
            hits += int((outputs.argmax(1) == targets).sum())
            images += len(targets)
        return hits / images

    def negative_loss(model: nn.Module) -> float:
        total, images = 0.0, 0
        for batch in val.epoch(0, 0):
            size = count_images(batch).images
            total += float(loss(predict(model, batch), targets_of(batch))) * size
            images += size
        return -total / images

    def own(model: nn.Module) -> float:
        assert metric is not None
        rows = [(predict(model, batch).detach(), targets_of(batch)) for batch in val.epoch(0, 0)]
        return float(metric(torch.cat([outputs for outputs, _ in rows]), torch.cat([targets for _, targets in rows])))

    if metric is not None:
        return getattr(metric, "__name__", type(metric).__name__).strip("<>"), own
    return ("accuracy", accuracy) if default else ("negative loss", negative_loss)


def first_batches(bench: Workbench, val: Feed, seeds: Sequence[int]) -> tuple[Any, int]:
    """Return the first training batch and the number of validation images; loss and score are tried on the model.

    Raises:
        BadData: a loader is empty, or the model, the loss or the score cannot be computed.
    """
    first = next(bench.train.take(int(seeds[0]) if len(seeds) else 0, 1))
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(first)):
        raise BadData(complaint("train", type(first).__name__, "batches with tensors"))
    images = sum(count_images(batch).images for batch in val.epoch(0, 0))
    if not images:
        raise BadData(complaint("val", "no image", "one image or more: they decide which treatment is best"))
    model = bench.model if next(iter(bench.model.parameters()), first).device == bench.device else None
    if model is None:
        return first, images
    for argument, function in (("train", lambda: bench.loss(model, first)), ("val", lambda: bench.score(model))):
        with quietly(model):
            try:
                value = float(function())
            except FinetuneBNError:
                raise
            except Exception as error:
                allowed = f"batches that {type(model).__name__}, the loss and the metric take"
                why = f"They said: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                raise BadData(complaint(argument, type(first).__name__, allowed, why)) from error
        if argument == "train" and not math.isfinite(value):
            why = "Look for NaN or infinite numbers in images and weights."
            raise BadData(complaint("train", f"a loss of {value} before training", "a finite one", why))
    return first, images
