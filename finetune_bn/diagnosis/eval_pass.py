"""One pass of a loader's first images through a network in eval mode, and what its BatchNorm layers got of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.functional.design_effect import LabelCounts
from finetune_bn.functional.moments import Moments, measure_images, merge_all
from finetune_bn.layers.sites import BatchNormSite
from finetune_bn.utilities.batches import Chunk, Feeder, join
from finetune_bn.utilities.labels import LabelNumbers, labels_of

# Images that go through the network together where batches are smaller; a whole batch where it is larger.
_TOGETHER = 64


@dataclass
class SeenLayer:
    """What a layer got of all images.

    Attributes:
        parts: moments of the values of each pass; of all calls of a layer that is called more than once.
        means: means over positions, [n, C] float32 each pass, of its first call.
        within: sum over images of the variance about that mean, [C].
        positions: values of a channel in one image; 0 where its rows are no images.
    """

    parts: list[Moments] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)
    within: Tensor | float = 0.0
    positions: int = 0

    @property
    def moments(self) -> Moments | None:
        """Those of all values; None where the layer never ran."""
        return merge_all(self.parts) if self.parts else None


@dataclass
class Seen:
    """What a pass has shown.

    Attributes:
        layers: one a site, in its order.
        sizes: images of each batch, those with NaN included.
        numbers: for each image measured, the number of the batch that it came in.
        labels: for each image measured, its label; empty where batches hold none.
        counts: the labels, batch by batch.
        batches: the first batches as they came, two at most, of one size where there are two such.
        chunks: the same as calls of the model, on its device.
        bad: images left out as they hold NaN or infinite values: (number of the batch, place in it).
        whole: whether the loader was read to its end.
    """

    layers: list[SeenLayer]
    sizes: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    counts: LabelCounts = field(default_factory=LabelCounts)
    batches: list[Any] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    bad: list[tuple[int, int]] = field(default_factory=list)
    whole: bool = False

    @property
    def images(self) -> int:
        """How many were measured."""
        return len(self.numbers)


def eval_pass(
    feeder: Feeder,
    sites: Sequence[BatchNormSite],
    batches: Iterable[Any],
    *,
    labels: int | str | None,
    max_images: int,
    until: float,
    report: Callable[[int, str], None],
) -> Seen:
    """Pass images through a model that is in eval mode, without gradients, and return what its layers got.

    Args:
        feeder: knows how a batch becomes a call of the model.
        sites: the layers.
        batches: the loader.
        labels: where the labels are in a batch; None: where they usually are, if there are any.
        max_images: so many images are enough; the batch with the last of them is taken whole.
        until: by `time.perf_counter`, when no further batch is taken.
        report: moves the progress bar.

    Raises:
        BadData: there are no batches, or no image without NaN.
        FinetuneBNError: the model does not take the images.
    """
    seen = Seen([SeenLayer() for _ in sites])
    chunks = _chunks(feeder, seen, batches, labels, max_images, until)
    for chunk in _grouped(chunks):
        pass_chunk(feeder, sites, chunk, seen)
        seen.numbers += chunk.batch
        report(seen.images, f"of up to {max_images}")
    if not seen.sizes:
        raise BadData(complaint("loader", "no batches", "at least one batch of images"))
    if not seen.images:
        given = f"NaN or infinite values in all {len(seen.bad)} images"
        raise BadData(complaint("loader", given, "images of finite numbers", "Look at what loads and normalizes them."))
    return seen


def _chunks(
    feeder: Feeder, seen: Seen, batches: Iterable[Any], where: int | str | None, max_images: int, until: float
) -> Iterator[Chunk]:
    """Yield the batches as chunks, without the images that are not finite, and note what they hold."""
    names, total = LabelNumbers(), 0
    iterator = iter(batches)
    while total < max_images and (not seen.sizes or time.perf_counter() < until):
        try:
            batch = next(iterator)
        except StopIteration:
            seen.whole = True
            return
        chunk = feeder.chunk(batch, len(seen.sizes))
        found = _labels(names.numbered(batch), where, len(chunk))
        seen.sizes.append(len(chunk))
        total += len(chunk)
        good = _finite(chunk, seen)
        if found is not None:
            seen.counts.add(found)
            seen.labels += [found.tolist()[i] for i in good]
        if not good:
            continue
        chunk = chunk if len(good) == len(chunk) else chunk[good]
        if len(seen.chunks) < 2 and (not seen.chunks or len(chunk) >= len(seen.chunks[0])):
            seen.batches.append(batch)
            seen.chunks.append(chunk)
        yield chunk


def _labels(batch: Any, where: int | str | None, images: int) -> Tensor | None:
    try:
        labels = labels_of(batch, where)
    except BadData:
        if where is not None:
            allowed = "where a batch of the loader holds one label an image"
            raise FinetuneBNError(complaint("labels", where, allowed)) from None
        return None
    usable = len(labels) == images and not labels.is_floating_point()
    return labels if usable else None


def _finite(chunk: Chunk, seen: Seen) -> list[int]:
    """Return the places of the images whose numbers are all finite."""
    fine = torch.ones(len(chunk), dtype=torch.bool)
    for leaf in tree_leaves(chunk.content):
        if not torch.is_tensor(leaf) or not leaf.is_floating_point() or not leaf.numel():
            continue
        if leaf.dim() and len(leaf) == len(chunk):
            rows = leaf.detach().flatten(1) if leaf.dim() > 1 else leaf.detach()[:, None]
            fine &= rows.isfinite().all(1).cpu()
    if bool(fine.all()):
        return list(range(len(chunk)))
    places = fine.tolist()
    seen.bad += [(chunk.batch[i], chunk.position[i]) for i, good in enumerate(places) if not good]
    # A batch that cannot be cut goes as a whole.
    return [i for i, good in enumerate(places) if good] if chunk.shape_key is not None else []


def _grouped(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Yield small batches joined, where they can be, and never a part of one."""
    waiting: list[Chunk] = []
    for chunk in chunks:
        alike = waiting and chunk.shape_key is not None and chunk.shape_key == waiting[0].shape_key
        if waiting and (not alike or sum(map(len, waiting)) + len(chunk) > _TOGETHER):
            yield join(waiting)
            waiting = []
        waiting.append(chunk)
    if waiting:
        yield join(waiting)


def pass_chunk(feeder: Feeder, sites: Sequence[BatchNormSite], chunk: Chunk, seen: Seen) -> None:
    """Pass images through the model, and add what its layers get to what was seen."""
    called: set[int] = set()

    def watch(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args else None
            if not torch.is_tensor(x) or x.dim() < 2 or not x.numel():
                return
            layer = seen.layers[number]
            moments, images = measure_images(x.detach())
            layer.parts.append(Moments(moments.count, moments.mean.cpu(), moments.m2.cpu()))
            if number not in called and len(x) == len(chunk):
                layer.means.append(images.absolute.float().cpu())
                layer.within = layer.within + images.var.sum(0, dtype=torch.float64).cpu()
                layer.positions = images.positions
            called.add(number)

        return hook

    handles = [site.module.register_forward_pre_hook(watch(i)) for i, site in enumerate(sites)]
    try:
        feeder(chunk)
    except FinetuneBNError:
        raise
    except Exception as error:
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(chunk.content) if torch.is_tensor(leaf)]
        allowed = f"images that {type(feeder.model).__name__}.forward takes"
        said = f"The model said: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise FinetuneBNError(complaint("loader", shapes, allowed, said)) from error
    finally:
        for handle in handles:
            handle.remove()
