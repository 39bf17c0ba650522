"""How many images a batch holds, whatever it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

USUAL_NAMES = ("image", "images", "img", "imgs", "pixel_values", "inputs", "input", "x", "data")
# What the batches of graph libraries call their number of graphs.
_COUNTS = ("num_graphs", "batch_size")
_CHANNELS = (1, 3, 4)


@dataclasses.dataclass(frozen=True)
class Count:
    """How many images there are.

    Attributes:
        images: the number; 1 where nothing tells.
        first: whether it is the length of tensors, whose first dimension then counts images.
        known: whether something told.
    """

    images: int
    first: bool = True
    known: bool = True


def count_images(content: Any, *, takes_lists: bool = True) -> Count:
    """Return how many images a batch holds: a tensor's first dimension, a list of images' length, a graph batch's own.

    Args:
        content: a tensor, or tensors in tuples, lists, dicts and dataclasses, of which the first counts (in a dict
            "image" and its kin); lists of images [C, H, W]; or an object of a class of its own.
        takes_lists: whether a list of tensors with three dimensions at the top may be one of images: for a network of
            sequences it is (input, target), each [N, length, features].
    """
    if takes_lists and is_list_of_images(content):
        return Count(len(content), first=False)
    return _count(content) or Count(1, first=False, known=False)


def count_in_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Count:
    """Return how many images a module is called with: by its first argument that tells, else by keyword."""
    return _count(args) or _count(kwargs) or Count(1, first=False, known=False)


def is_list_of_images(content: Any) -> bool:
    """Whether this is a list or tuple of tensors [C, H, W], and of nothing else: what detectors take."""
    if not _all_have_three_dimensions(content):
        return False
    return content[0].shape[0] in _CHANNELS and len({len(image) for image in content}) == 1


def _count(content: Any) -> Count | None:
    if torch.is_tensor(content):
        return Count(len(content)) if content.dim() else None
    if isinstance(content, PackedSequence):
        return Count(int(content.batch_sizes[0]), first=False)
    if isinstance(content, Mapping):
        names = [name for name in USUAL_NAMES if name in content]
        return _first([content[name] for name in names] + list(content.values()))
    if isinstance(content, (list, tuple)):
        return _first(content)
    for name in _COUNTS:
        value = getattr(content, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return Count(value, first=False)
    if dataclasses.is_dataclass(content) and not isinstance(content, type):
        return _first([getattr(content, field.name) for field in dataclasses.fields(content)])
    return None


def _first(parts: Sequence[Any]) -> Count | None:
    for part in parts:
        # Within a batch, a list of tensors without a dimension for images is a list of images.
        if isinstance(part, (list, tuple)) and _all_have_three_dimensions(part):
            return Count(len(part), first=False)
        found = _count(part)
        if found is not None:
            return found
    return None


def _all_have_three_dimensions(content: Any) -> bool:
    if not isinstance(content, (list, tuple)) or not content:
        return False
    return all(isinstance(t, Tensor) and t.dim() == 3 and t.is_floating_point() for t in content)
