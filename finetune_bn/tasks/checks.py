"""Checks of arguments and batches that the tasks share; each failure is one error that says what to do."""

from __future__ import annotations

import difflib
import math
from typing import Any

import torch
from timm.optim import get_optimizer_info, list_optimizers
from torch import Tensor

from finetune_bn.errors import BadData, FinetuneBNError, complaint


def images_of(batch: Any) -> Tensor:
    """Return the images of a batch, with labels or without; raise `BadData` where there are none."""
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point() and len(images):
        return images
    raise _bad_batch(batch)


def images_and_labels(batch: Any, batch_idx: int, num_classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the two parts of a batch; raise `BadData` where it has others, or labels that are none of the classes.

    Args:
        batch: what the loader gave.
        batch_idx: its number in the epoch.
        num_classes: labels lie below it; None for labels that can be any numbers from 0 up.
    """
    images = images_of(batch)
    labels = batch[1] if not isinstance(batch, Tensor) and len(batch) == 2 else None
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise _bad_batch(batch)
    # To look at labels that lie on a GPU is to wait for it, so there it is done once a loader and epoch.
    if labels.device.type == "cpu" or batch_idx == 0:
        wrong = labels[(labels < 0) | (labels >= (math.inf if num_classes is None else num_classes))].tolist()
        if wrong:
            allowed, remedy = "0 and above", "Count them from 0."
            if num_classes is not None:
                allowed = f"0 to {num_classes - 1} (num_classes - 1)"
                remedy = "Set num_classes to the data's number of classes, and count them from 0."
            raise BadData(complaint("labels", wrong[0], allowed, remedy))
    return images, labels


def _bad_batch(batch: Any) -> BadData:
    allowed = "(images, labels): float [N, 3, H, W], normalized, and int64 [N], N at least 1"
    return BadData(complaint("batch", _form(batch), allowed, "The collate_fn of a DataLoader can bring it there."))


def _form(batch: Any) -> str:
    """Return what a batch is made of, for errors."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
    if isinstance(batch, (tuple, list)):
        return f"({', '.join(_form(part) for part in batch)})"
    return type(batch).__name__


def check_optimizer(name: str) -> None:
    """Raise unless timm has the optimizer, and it needs no backward pass of its own kind."""
    known = [str(known) for known in list_optimizers()]
    base = str(name).lower().removeprefix("lookahead_")
    if base not in known or get_optimizer_info(base).second_order:
        close = difflib.get_close_matches(base, known, n=3) if base not in known else []
        remedy = f"Closest: {', '.join(close)}." if close else ""
        allowed = "a name of timm.optim.list_optimizers() that needs first derivatives only"
        raise FinetuneBNError(complaint("optimizer", name, allowed, remedy))
