"""How much of an image's output depends on the other images of its batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.functional.moments import accumulator
from finetune_bn.layers.sites import BatchNormSite, find_batch_norms
from finetune_bn.utilities.batches import Chunk, Feeder, Forward, join
from finetune_bn.utilities.layer_figure import layer_figure
from finetune_bn.utilities.probe import can_run, check_whole, quietly, tensors_in
from finetune_bn.utilities.results import Result, Shown


@dataclass(frozen=True)
class LayerLeakage:
    """One layer.

    Attributes:
        names: all its names in the model.
        kind: class name.
        leakage: how far its output for an image moves when the other images are exchanged, root mean square,
            relative to how far the outputs of two images are apart; exactly 0 where nothing leaks.
    """

    names: tuple[str, ...]
    kind: str
    leakage: float


@dataclass(frozen=True)
class Leakage(Result):
    """What `measure_leakage` found; `print` it for a table.

    Attributes:
        total: how far the model's own output for an image moves, as `LayerLeakage.leakage`.
        images: how many images were looked at, each in two batches.
        batch_size: images in each batch.
        rows: one a BatchNorm layer, in the order in which the data reach them.
    """

    total: float
    images: int
    batch_size: int
    rows: tuple[LayerLeakage, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        rows = [{"names": list(r.names), "kind": r.kind, "leakage": r.leakage} for r in self.rows]
        return {"total": self.total, "images": self.images, "batch_size": self.batch_size, "rows": rows}

    def shown(self) -> Shown:
        """Return how far the output of an image moves, and a row a layer."""
        lines = [(" = ".join(row.names), f"{row.leakage:.4f}") for row in self.rows]
        said = (
            "nothing leaks: an image's output does not depend on its batch"
            if self.total == 0
            else f"the output of an image moves by {100 * self.total:.1f} % of the distance between two images when "
            f"{self.batch_size - self.images} images of its batch are exchanged"
        )
        return Shown(said, ("layer", "leakage"), lines, line=False)

    def plot(self) -> Any:
        """Return a matplotlib figure: the leakage of each layer, in the order in which the data reach them."""
        names = [row.names[0] for row in self.rows]
        leakage = {"leakage": [row.leakage for row in self.rows]}
        return layer_figure("What leaks from the other images of a batch", names, {"leakage": leakage})


def measure_leakage(
    model: nn.Module,
    batch: Any,
    other: Any,
    *,
    images: int | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
) -> Leakage:
    """Tell how far an image's output moves when its batch peers change, as the BatchNorm layers are in training.

    The first `images` of `batch` go through the model twice: with the rest of `batch` and with the rest of `other`.
    BatchNorm layers are in training mode, everything else (dropout, drop path) in eval mode, and layers that draw at
    random draw the same both times; so whatever moves came from the other images. The model is left as it was,
    running statistics included.

    Args:
        model: any module.
        batch: a batch as it comes in training: a tensor [N, ...], a tuple that starts with one, or a dict.
        other: another such batch, with N images or more.
        images: how many images keep their place; None: a quarter of the batch, at least one.
        forward: `(model, batch)` that passes a batch to the model and returns its output [N, ...].
        device: where batches are moved to; None: where the model is.

    Raises:
        FinetuneBNError: the batches are too small or not alike, the model returns nothing with a row an image, or it is
            sharded by FSDP.
    """
    if not isinstance(model, nn.Module) or not can_run(model):
        raise FinetuneBNError(complaint("model", type(model).__name__, "a torch.nn.Module with values in it"))
    check_whole(model)
    feeder = Feeder(model, forward, device)
    first, second, kept = _two_batches(feeder, batch, other, images)
    sites = find_batch_norms(model)
    with quietly(model), as_in_training([site.module for site in sites]):
        one = _run(feeder, first, sites, kept)
    with quietly(model), as_in_training([site.module for site in sites]):
        two = _run(feeder, second, sites, kept)
    rows = [
        LayerLeakage(sites[number].names, sites[number].kind, moved(output, two.layers[number]))
        for number, output in one.layers.items()
    ]
    total = max(moved(a, b) for a, b in zip(one.outputs, two.outputs, strict=True))
    return Leakage(total, kept, len(first), tuple(rows))


@dataclass
class _Outputs:
    layers: dict[int, Tensor] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)


def _two_batches(feeder: Feeder, batch: Any, other: Any, images: int | None) -> tuple[Chunk, Chunk, int]:
    """Return two batches that begin with the same images and go on with different ones."""
    one, two = feeder.chunk(batch, 0), feeder.chunk(other, 1)
    size = len(one)
    kept = max(1, size // 4) if images is None else images
    if not 1 <= kept < size:
        raise FinetuneBNError(complaint("images", kept, f"1 to {size - 1}: a batch has {size}"))
    if one.shape_key is None or one.shape_key != two.shape_key or len(two) < size:
        raise BadData(complaint("other", f"{len(two)} images", f"{size} or more, in tensors like those of batch"))
    return one, join([one[:kept], two[kept:size]]), kept


@contextlib.contextmanager
def as_in_training(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Put BatchNorm layers in training mode for a block; what they write into their buffers is undone behind it."""
    # By value: BatchNorm's kernel writes them past the counter of changes.
    buffers = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]
    modes = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _run(feeder: Feeder, chunk: Chunk, sites: Sequence[BatchNormSite], kept: int) -> _Outputs:
    """Return what layers and model return for the first `kept` images of a batch, one row an image."""
    found = _Outputs()

    def watch(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.shape[0] == len(chunk) and number not in found.layers:
                found.layers[number] = _rows(output, kept)

        return hook

    handles = [site.module.register_forward_hook(watch(number)) for number, site in enumerate(sites)]
    try:
        output = feeder(chunk)
    finally:
        for handle in handles:
            handle.remove()
    found.outputs = [_rows(t, kept) for t in tensors_in(output) if t.dim() and len(t) == len(chunk)]
    if not found.outputs:
        raise FinetuneBNError(
            complaint("model", type(output).__name__, "one that returns a tensor with a row an image")
        )
    return found


def _rows(output: Tensor, kept: int) -> Tensor:
    return output[:kept].detach().flatten(1).to(accumulator(output), copy=True)


def moved(one: Tensor, two: Tensor) -> float:
    """Return the root mean square distance between rows, relative to that between two different rows of `one`."""
    if torch.equal(one, two):
        return 0.0
    between = (one - one.mean(0)).square().sum(1).mean() * 2 if len(one) > 1 else one.square().sum(1).mean()
    moved = (one - two).square().sum(1).mean()
    return float((moved / between.clamp_min(torch.finfo(one.dtype).tiny)).sqrt())


def output_gap(one: Any, other: Any, images: int) -> float | None:
    """Return the largest distance between what a model returned in two modes for the same images, as `moved`.

    Args:
        one: the tensors that it returned.
        other: what it returned in the other mode.
        images: how many; tensors without a row an image, or of whole numbers, do not count. None where none is left.
    """
    pairs = zip(tensors_in(one), tensors_in(other), strict=False)
    gaps = [
        moved(a.flatten(1).to(accumulator(a)), b.flatten(1).to(accumulator(b)))
        for a, b in pairs
        if a.shape == b.shape and a.dim() and len(a) == images and a.is_floating_point()
    ]
    return max(gaps, default=None)
