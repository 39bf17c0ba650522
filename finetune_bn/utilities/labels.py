"""Find the labels in a batch, whatever form it has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune_bn.errors import BadData, complaint

LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def labels_of(batch: Any, where: int | str | None, remedy: str = "Say where they are: labels=.") -> Tensor:
    """Return the labels [N] of a batch, looked for at a position or a key; `None` looks at the usual ones.

    Args:
        batch: a batch as it comes from a loader.
        where: position in a tuple, or key of a dictionary.
        remedy: what the message of the error ends with.

    Raises:
        BadData: there are none.
    """
    keys = list(batch) if isinstance(batch, dict) else range(len(batch)) if isinstance(batch, (tuple, list)) else []
    if where is None:
        usual: Any = LABEL_KEYS if isinstance(batch, dict) else (1,)
        where = next((key for key in usual if key in keys), None)
    elif isinstance(where, int) and not isinstance(batch, dict) and where < 0:
        where += len(keys)
    labels = batch[where] if where is not None and where in keys else None
    if isinstance(labels, (list, tuple)) and labels and all(isinstance(label, (int, str)) for label in labels):
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        labels = torch.tensor([numbers[label] for label in labels])
    if not isinstance(labels, Tensor) or labels.dim() != 1:
        given = f"a {type(batch).__name__} of {list(keys)}" if keys else f"a {type(batch).__name__}"
        allowed = "labels [N], one an image, second in a tuple or under a usual key of a dictionary"
        raise BadData(complaint("training batch", given, allowed, remedy))
    return labels.detach().cpu()


class LabelNumbers:
    """Numbers for labels that are names: one number a name, in all batches."""

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}

    def numbered(self, batch: Any) -> Any:
        """Return a batch whose lists of names or numbers are tensors."""
        if isinstance(batch, dict):
            return {key: self._number(value) for key, value in batch.items()}
        return [self._number(value) for value in batch] if isinstance(batch, (list, tuple)) else batch

    def _number(self, value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or not value or not all(isinstance(v, (int, str)) for v in value):
            return value
        return torch.tensor([self._known.setdefault(v, len(self._known)) for v in value])
