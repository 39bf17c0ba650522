"""What a task asks of a loss of pytorch-metric-learning, or of one made in its image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from finetune_bn.errors import FinetuneBNError, complaint


def default_loss() -> nn.Module:
    """Return pytorch-metric-learning's NTXentLoss as it comes."""
    from pytorch_metric_learning.losses import NTXentLoss  # type: ignore[import-untyped]

    loss: nn.Module = NTXentLoss()
    return loss


def check_module(argument: str, given: object) -> nn.Module:
    """Return `given` if it is a module; raise otherwise."""
    if not isinstance(given, nn.Module):
        allowed = f"a {argument} of pytorch-metric-learning, or another module"
        raise FinetuneBNError(complaint(argument, type(given).__name__, allowed))
    return given


def distance_of(loss: nn.Module) -> Any:
    """Return the distance of a loss, or of the first one that it is wrapped around; None where there is none."""
    found = [getattr(module, "distance", None) for module in loss.modules()]
    return next(filter(None, found), None)


def queues_of(loss: nn.Module) -> list[tuple[str, Any]]:
    """Return the cross-batch memories in a loss, with their names in it."""
    return [(name, module) for name, module in loss.named_modules() if hasattr(module, "embedding_memory")]


def has_parameters(loss: nn.Module) -> bool:
    """Tell whether a loss learns something itself, such as proxies."""
    return any(True for _ in loss.parameters())


def class_counts(loss: nn.Module) -> list[tuple[str, int]]:
    """Return how many classes the parts of a loss that learn something for each class were made for, by argument."""
    return [
        (".".join(part for part in ("loss", name, "num_classes") if part), module.num_classes)
        for name, module in loss.named_modules()
        if isinstance(getattr(module, "num_classes", None), int) and list(module.parameters(recurse=False))
    ]


def compute(loss: nn.Module, miner: nn.Module | None, embeddings: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of a batch, of those pairs or triplets that the miner picks.

    Args:
        loss: takes embeddings, labels and what the miner found, or None.
        miner: takes embeddings and labels.
        embeddings: [N, D].
        labels: whole numbers [N].

    Raises:
        FinetuneBNError: one of them does not take such a batch.
    """
    try:
        found = None if miner is None else miner(embeddings, labels)
        value: Tensor = loss(embeddings, labels, found)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        allowed = "a loss, with a miner or without, of "
        allowed += f"embeddings {list(embeddings.shape)} and labels up to {int(labels.max())}"
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".rstrip(": .")
        remedy = f"It said: {said}. Where it has them, embedding_size is `dimension`, num_classes the number of labels."
        raise FinetuneBNError(complaint("loss", type(loss).__name__, allowed, remedy)) from error
    return value
