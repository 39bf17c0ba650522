"""Run a model over chunks of images while chosen BatchNorm layers measure what they receive.

Three ways, by what the layers normalize by meanwhile: the statistics of all chunks (lock-step), of each chunk, or
those that they had.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.functional.moments import (
    ImageMoments,
    Moments,
    has_long_rows,
    measure_images,
    measures_faster,
    merge_all,
)
from finetune_bn.layers.statistics import Statistics, normalize, normalize_by_batch
from finetune_bn.recalibration.measured_layer import MeasuredLayer
from finetune_bn.recalibration.rehearsal import patched
from finetune_bn.utilities.batches import Chunk, Feeder, join, recut
from finetune_bn.utilities.lockstep import (
    FINISHED,
    MOST_PASSES,
    NotSideBySide,
    caller_settings,
    meet,
    run_in_lockstep,
)
from finetune_bn.utilities.processes import OtherProcessFailed, Ranks

# All of the first images tell how images differ, later ones at intervals: the estimate needs no more, and costs time.
_LOOK_AT_ALL, _LOOK_EVERY = 32, 16
# Images that go through the model at once in lock-step, at most; and on a CPU as many as hold so many values, by which
# 32 of 64 pixels and 2 of 224 pixels: enough to fill a core, and few enough for its caches.
PIECE, _VALUES_OF_A_PIECE = 64, 1 << 19

Settle = Callable[[int, Moments], Statistics]


def cut(chunks: Sequence[Chunk], device: torch.device, most: int = MOST_PASSES) -> list[Chunk]:
    """Return the chunks as pieces of the size in which they go through a model in lock-step.

    Larger ones where they would be more than `most`; what can be neither cut nor joined stays as it is.
    """
    size = PIECE
    if chunks and device.type == "cpu":
        fit = max(_VALUES_OF_A_PIECE // max(chunks[0].values_of_an_image, 1), 1)
        size = min(size, 1 << (fit.bit_length() - 1))  # a power of two, as batches are: less to cut and join
    pieces = list(recut(chunks, size))
    while len(pieces) > most and size < sum(map(len, chunks)):
        size *= 2
        pieces = list(recut(chunks, size))
    return pieces


class Collector:
    """Measures while a model runs; the model's own tensors are not written to.

    Args:
        layers: the layers that measure.
        feeder: passes chunks to the model.
        ranks: the processes whose data are pooled.
        settle: turns (number of a layer, moments) into the statistics by which it is to normalize.
        preserve: the layers normalize by what they had, whatever they measure.

    Attributes:
        order: numbers of the layers, in the order of their first calls.
        cut_up: whether images that are normalized together go through the model in pieces, in lock-step.
        in_order: numbers of the layers at which images arrive one after the other, each with as many rows.
    """

    def __init__(
        self, layers: Sequence[MeasuredLayer], feeder: Feeder, ranks: Ranks, settle: Settle, preserve: bool
    ) -> None:
        self.layers = list(layers)
        self.feeder = feeder
        self.ranks = ranks
        self.settle = settle
        self.preserve = preserve
        self.order: list[int] = []
        self.cut_up = feeder.device.type == "cpu" and not preserve
        self.in_order: frozenset[int] = frozenset()
        self._seen = 0
        self._settings = caller_settings(feeder.device)
        self._at = threading.local()

    def forget(self) -> None:
        """Start anew."""
        self._seen = 0
        self.order.clear()
        for layer in self.layers:
            layer.forget()

    @property
    def current(self) -> Chunk:
        """The chunk or piece that is in the model, of those on the calling thread."""
        chunk: Chunk = self._at.chunk
        return chunk

    def cut(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Return the chunks as pieces of the size in which they go through the model in lock-step."""
        return cut(chunks, self.feeder.device)

    def one_by_one(self, chunks: Sequence[Chunk], *, as_kernel: bool) -> None:
        """Run chunks as one, each layer normalizing by all of them, or by what it had where that is preserved.

        Args:
            chunks: the images; of one `shape_key`.
            as_kernel: the statistics settled on are those measured, which BatchNorm's kernel for training can use.
        """
        if self.cut_up and len(pieces := cut(chunks, self.feeder.device)) > 1 and self._in_pieces(pieces, as_kernel):
            return
        chunk = join(chunks)
        way = self._preserving if self.preserve else partial(self._by_itself, as_kernel=as_kernel)
        with self._patched(way), self._settings():
            self._feed(chunk, self._looked_at(chunk))

    def _in_pieces(self, pieces: Sequence[Chunk], as_kernel: bool) -> bool:
        """Run the pieces in lock-step: the same, without the large allocations, which cost more than sums.

        False where the pieces cannot, as they take different paths through the model; then nothing was measured.
        """
        seen, restore = self._seen, [layer.snapshot() for layer in self.layers]
        jobs = [partial(self._feed, piece, self._looked_at(piece)) for piece in pieces]

        def pool(place: int, brought: list[Moments]) -> Statistics | None:
            return None if place == FINISHED else self._of_chunk(place, merge_all(brought), as_kernel=as_kernel)

        try:
            with self._patched(self._by_all):
                run_in_lockstep(jobs, pool, self._settings)
        except NotSideBySide:
            self.cut_up, self._seen = False, seen
            for each in restore:
                each()
            return False
        return True

    def together(self, pieces: Sequence[Chunk], on_layer: Callable[[int], None]) -> None:
        """Run the pieces in lock-step, each layer normalizing by the statistics of all of them, on all processes.

        What was measured before is forgotten.
        """
        self.forget()
        jobs = [partial(self._feed, piece, self._looked_at(piece)) for piece in pieces]
        try:
            with self._patched(self._by_all):
                run_in_lockstep(jobs, partial(self._pool, on_layer), self._settings)
        except OtherProcessFailed:
            raise
        except BaseException:
            self.ranks.fail(1)
            raise

    def _feed(self, chunk: Chunk, looked_at: Sequence[slice]) -> None:
        self._at.chunk, self._at.looked_at = chunk, looked_at
        self.feeder(chunk)

    def _looked_at(self, chunk: Chunk) -> list[slice]:
        """Return which images of the chunk tell how images differ."""
        start, number = self._seen, len(chunk)
        self._seen += number
        first = min(max(_LOOK_AT_ALL - start, 0), number)
        later = first + -(start + first) % _LOOK_EVERY
        return [part for part in (slice(0, first), slice(later, number, _LOOK_EVERY)) if part.start < part.stop]

    def _patched(self, way: Callable[[int, Tensor], Tensor]) -> contextlib.AbstractContextManager[None]:
        """Let the layers compute by `way(number, input)`; their hooks go on as they were."""

        def arrive(number: int, x: Tensor) -> Tensor:
            if number not in self.order:
                self.order.append(number)
            return way(number, x)

        return patched([layer.module for layer in self.layers], arrive)

    def _preserving(self, number: int, x: Tensor) -> Tensor:
        module = self.layers[number].module
        self._measure(number, x)
        y: Tensor = type(module).forward(module, x)
        return y

    def _by_itself(self, number: int, x: Tensor, *, as_kernel: bool) -> Tensor:
        layer = self.layers[number]
        values = x.numel() // x.shape[1]
        kernel = as_kernel and values > 1 and not self._at.chunk.mask and not measures_faster(x)
        if kernel and layer.suits_kernel(x):
            mean, var = layer.next_row
            y = normalize_by_batch(layer.module, x, layer.before, mean, var)
            if Moments(values, mean, var * (values - 1)).mean_is_in_range():
                layer.note_row(values, self._some_images(number, x, mean))
            else:
                mean.zero_()
                var.zero_()
                self._measure(number, x)
            return y
        moments = self._measure(number, x)
        return normalize(layer.module, x, self._of_chunk(number, moments, as_kernel=as_kernel))

    def _of_chunk(self, number: int, moments: Moments, *, as_kernel: bool) -> Statistics:
        """Return by what a chunk is normalized: as in training by the variance over n, unless more is settled on."""
        if moments.count < 2:  # one value alone has no variance to normalize by
            return self.layers[number].before
        if as_kernel:
            return self.layers[number].before.moved_to(moments.mean, moments.var(), preserve=False)
        return self.settle(number, moments)

    def _by_all(self, number: int, x: Tensor) -> Tensor:
        moments = self._measure(number, x)
        settled: Statistics = meet(number, moments)
        return normalize(self.layers[number].module, x, settled)

    def _measure(self, number: int, x: Tensor) -> Moments:
        layer = self.layers[number]
        counting = self._counting(number, x)
        if not (x if counting is None else counting).numel():  # as where a detector proposes nothing
            moments = Moments.none(layer.before.mean.numel(), x.device)
            layer.note(moments)
            return moments
        some: list[ImageMoments] = []
        if counting is not None:
            moments = Moments.of(counting)
        elif has_long_rows(x):
            moments, images = measure_images(x)
            alike = len(x) == len(self._at.chunk)
            some = (
                [images[part] for part in self._at.looked_at] if alike else self._some_images(number, x, moments.mean)
            )
        else:
            moments = Moments.of(x)
            some = self._some_images(number, x, moments.mean)
        layer.note(moments, some, () if moments.is_finite else self._not_finite(x))
        return moments

    def _counting(self, number: int, x: Tensor) -> Tensor | None:
        """Return the values of `x` that count, [n, C]; None where all do.

        Raises:
            BadData: there is no mask for what the layer sees.
        """
        chunk: Chunk = self._at.chunk
        positions = tuple(x.shape[2:])
        if not chunk.mask or (len(x) == len(chunk) and math.prod(positions) == 1):  # behind the pooling
            return None
        for mask in chunk.mask:
            if tuple(mask.shape) == (len(x), *positions):
                return x.movedim(1, -1)[mask]
            if x.dim() == 2 and mask.numel() == len(x):
                return x[mask.flatten()]
        given = f"{', '.join(str(tuple(mask.shape)) for mask in chunk.mask)}"
        allowed = f"one of shape {(len(chunk), *positions)} for layer {self.layers[number].name!r}"
        if x.dim() == 2:
            allowed = f"one of {len(x)} values for layer {self.layers[number].name!r}"
        remedy = "Return several masks, one for each length that layers see, or leave the layer out by layers=."
        raise BadData(complaint("mask", given, allowed, remedy))

    def _some_images(self, number: int, x: Tensor, pivot: Tensor) -> list[ImageMoments]:
        """Return the moments of images that tell how images differ; none where nothing says whose rows are whose."""
        images = len(self._at.chunk)
        if len(x) != images:
            if number not in self.in_order or len(x) % images:
                return []
            x = x.reshape(images, len(x) // images, x.shape[1], -1).transpose(1, 2)
        return [ImageMoments.of(x[part], pivot) for part in self._at.looked_at if part.start < images]

    def _not_finite(self, x: Tensor) -> set[int]:
        """Return the batches whose images have NaN or infinite values in `x`."""
        batches: tuple[int, ...] = self._at.chunk.batch
        if x.shape[0] != len(batches):
            return set(batches)
        finite = x.flatten(1).isfinite().all(1).tolist()
        return {batch for batch, good in zip(batches, finite, strict=True) if not good} or set(batches)

    def _pool(self, on_layer: Callable[[int], None], place: int, brought: list[Moments]) -> Statistics | bool | None:
        places = {int(row[0]) for row in self.ranks.agree(float(place))}
        if places == {FINISHED}:
            return None
        here = places - {FINISHED}  # a process without data has none to bring, at any layer
        if len(here) > 1:
            raise FinetuneBNError(
                complaint("mode", "exact", "a model that calls its layers in the same order on every process")
            )
        number = here.pop()
        layer = self.layers[number]
        own = merge_all(brought) if brought else Moments.none(layer.before.mean.numel(), layer.before.mean.device)
        pooled = own.all_reduce(self.ranks.group)
        self.check_finite(number, pooled)
        on_layer(len(self.order))
        settled = self.settle(number, pooled) if pooled.count else layer.before
        return settled if place != FINISHED else True

    def check_finite(self, number: int, pooled: Moments) -> None:
        """Raise if NaN or infinite values arrived at a layer; those behind it need no mention.

        Raises:
            FinetuneBNError: they did; with the layer's name and the batches.
        """
        if pooled.is_finite:
            return
        layer = self.layers[number]
        bad = sorted(layer.not_finite)
        batches = f"from batches {', '.join(map(str, bad[:8]))}" if bad else "from another process"
        raise FinetuneBNError(
            complaint(
                "batches",
                f"NaN or infinite values at the input of layer {layer.name!r}, {batches}",
                "finite activations",
                "Look for NaN in those images; in float16, for overflow: use bfloat16 or float32.",
            )
        )
