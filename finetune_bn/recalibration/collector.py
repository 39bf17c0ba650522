"""Run a model over chunks of images while chosen BatchNorm layers measure what they receive.

Three ways, by what the layers normalize by meanwhile: the statistics of all chunks (lock-step), of each chunk, or
those that they had.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.functional.image_spread import ImageSpread
from finetune_bn.functional.moments import (
    ImageMoments,
    Moments,
    accumulator,
    has_long_rows,
    measure_images,
    measures_faster,
    merge_all,
    merge_rows,
)
from finetune_bn.layers.statistics import Statistics, normalize, normalize_by_batch
from finetune_bn.utilities.batches import Chunk, Feeder, join, recut
from finetune_bn.utilities.lockstep import FINISHED, DifferentPaths, caller_settings, meet, run_in_lockstep
from finetune_bn.utilities.processes import OtherProcessFailed, Ranks

# All of the first images tell how images differ, later ones at intervals: the estimate needs no more, and costs time.
_LOOK_AT_ALL, _LOOK_EVERY = 32, 16
# Images that go through the model at once in lock-step, at most; and on a CPU as many as hold so many values, by which
# 32 of 64 pixels and 2 of 224 pixels: enough to fill a core, and few enough for its caches.
PIECE, _VALUES_OF_A_PIECE = 64, 1 << 19
# So many measurements of a layer are merged at once.
_MERGE_AT = 32

Settle = Callable[[int, Moments], Statistics]


def cut(chunks: Sequence[Chunk], device: torch.device) -> list[Chunk]:
    """Return the chunks as pieces of the size in which they go through a model in lock-step."""
    size = PIECE
    if chunks and device.type == "cpu":
        fit = max(_VALUES_OF_A_PIECE // max(chunks[0].values_of_an_image, 1), 1)
        size = min(size, 1 << (fit.bit_length() - 1))  # a power of two, as batches are: less to cut and join
    return list(recut(chunks, size))


class Layer:
    """A layer that measures, and what it has measured.

    What arrives waits and is merged many at once: one by one the small operations would take longer than the sums.

    Args:
        name: its first name in the model.
        module: the layer.
        before: its statistics when the measuring began.

    Attributes:
        not_finite: numbers of the batches with NaN or infinite values.
    """

    def __init__(self, name: str, module: nn.Module, before: Statistics) -> None:
        self.name = name
        self.module = module
        self.before = before
        self.forget()

    def forget(self) -> None:
        """Start anew."""
        channels, device = self.before.mean.numel(), self.before.mean.device
        self._known = (Moments.none(channels, device), ImageSpread.none(channels, device))
        self.not_finite: set[int] = set()
        self._waiting: list[Moments] = []
        self._counts: list[int] = []
        self._images: list[ImageMoments] = []
        self._rows = torch.zeros(2, _MERGE_AT, channels, dtype=self.before.mean.dtype, device=device)

    def suits_kernel(self, x: Tensor) -> bool:
        """Whether BatchNorm's kernel for training can run here; torch refuses to train with eps 0."""
        return self.before.eps > 0 and self._rows.dtype == accumulator(x)

    @property
    def next_row(self) -> tuple[Tensor, Tensor]:
        """Where the kernel for training is to write mean and unbiased variance, before `note_row`; 0 as yet."""
        mean, var = self._rows[:, len(self._counts)]
        return mean, var

    def note_row(self, count: int, images: Sequence[ImageMoments]) -> None:
        """Add what was written to `next_row`: statistics of so many values a channel; and as in `note` the images."""
        self._counts.append(count)
        self._images += images
        if len(self._counts) == _MERGE_AT:
            self._merge()

    def note(self, moments: Moments, images: Sequence[ImageMoments] = (), not_finite: Iterable[int] = ()) -> None:
        """Add what arrived, the images among it that tell how images differ, and which batches are not finite."""
        self._waiting.append(moments)
        self._images += images
        self.not_finite.update(not_finite)
        if len(self._waiting) == _MERGE_AT:
            self._merge()

    @property
    def moments(self) -> Moments:
        """The moments of everything that arrived."""
        self._merge()
        return self._known[0]

    @property
    def spread(self) -> ImageSpread:
        """How images differ."""
        self._merge()
        return self._known[1]

    def _merge(self) -> None:
        moments, spread = self._known
        parts = self._waiting
        if counts := self._counts:
            means, variances = self._rows[:, : len(counts)]
            degrees = torch.tensor(counts, device=means.device)[:, None] - 1
            parts = [*parts, merge_rows(counts, means, variances * degrees)]
            self._rows.zero_()
        if parts:
            moments = merge_all([moments, *parts])
        if self._images:
            spread = spread.merge(ImageSpread.of_images(self._images))
        self._known = moments, spread
        self._waiting, self._counts, self._images = [], [], []

    def snapshot(self) -> Callable[[], None]:
        """Return what brings back the state of now."""
        self._merge()
        known, not_finite = self._known, set(self.not_finite)

        def restore() -> None:
            self.forget()
            self._known, self.not_finite = known, not_finite

        return restore


class Collector:
    """Measures while a model runs; the model's own tensors are not written to.

    Args:
        layers: the layers that measure.
        feeder: passes chunks to the model.
        ranks: the processes whose data are pooled.
        settle: turns (number of a layer, moments) into the statistics by which it is to normalize.
        preserve: the layers normalize by what they had, whatever they measure.
    """

    def __init__(self, layers: Sequence[Layer], feeder: Feeder, ranks: Ranks, settle: Settle, preserve: bool) -> None:
        self.layers = list(layers)
        self.feeder = feeder
        self.ranks = ranks
        self.settle = settle
        self.preserve = preserve
        self.order: list[int] = []
        self._cut_up = feeder.device.type == "cpu" and not preserve
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
        if self._cut_up and len(pieces := self.cut(chunks)) > 1 and self._in_pieces(pieces):
            return
        chunk = join(chunks)
        way = self._preserving if self.preserve else partial(self._by_itself, as_kernel=as_kernel)
        with self._patched(way), self._settings():
            self._feed(chunk, self._looked_at(chunk))

    def _in_pieces(self, pieces: Sequence[Chunk]) -> bool:
        """Run the pieces in lock-step: the same, without the large allocations, which cost more than sums.

        False where the pieces take different paths through the model; then nothing was measured.
        """
        seen, restore = self._seen, [layer.snapshot() for layer in self.layers]
        jobs = [partial(self._feed, piece, self._looked_at(piece)) for piece in pieces]

        def pool(place: int, brought: list[Moments]) -> Statistics | None:
            return None if place == FINISHED else self.settle(place, merge_all(brought))

        try:
            with self._patched(self._by_all):
                run_in_lockstep(jobs, pool, self._settings)
        except DifferentPaths:
            self._cut_up, self._seen = False, seen
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

    @contextlib.contextmanager
    def _patched(self, way: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        """Let the layers compute by `way(number, input)`; their hooks go on as they were."""
        try:
            for number, layer in enumerate(self.layers):
                layer.module.forward = partial(self._arrive, way, number)
            yield
        finally:
            for layer in self.layers:
                vars(layer.module).pop("forward", None)

    def _arrive(self, way: Callable[[int, Tensor], Tensor], number: int, x: Tensor) -> Tensor:
        check = getattr(self.layers[number].module, "_check_input_dim", None)
        if check is not None:
            check(x)
        if number not in self.order:
            self.order.append(number)
        return way(number, x)

    def _preserving(self, number: int, x: Tensor) -> Tensor:
        module = self.layers[number].module
        self._measure(number, x)
        y: Tensor = type(module).forward(module, x)
        return y

    def _by_itself(self, number: int, x: Tensor, *, as_kernel: bool) -> Tensor:
        layer = self.layers[number]
        values = x.numel() // x.shape[1]
        if as_kernel and values > 1 and layer.suits_kernel(x) and not measures_faster(x):
            mean, var = layer.next_row
            y = normalize_by_batch(layer.module, x, layer.before, mean, var)
            if Moments(values, mean, var * (values - 1)).mean_is_in_range():
                layer.note_row(values, self._some_images(x, mean))
            else:
                mean.zero_()
                var.zero_()
                self._measure(number, x)
            return y
        moments = self._measure(number, x)
        if values == 1:  # one value alone has no variance to normalize by
            return normalize(layer.module, x, layer.before)
        return normalize(layer.module, x, self.settle(number, moments))

    def _by_all(self, number: int, x: Tensor) -> Tensor:
        moments = self._measure(number, x)
        settled: Statistics = meet(number, moments)
        return normalize(self.layers[number].module, x, settled)

    def _measure(self, number: int, x: Tensor) -> Moments:
        if has_long_rows(x):
            moments, images = measure_images(x)
            some = [images[part] for part in self._at.looked_at]
        else:
            moments = Moments.of(x)
            some = self._some_images(x, moments.mean)
        self.layers[number].note(moments, some, () if moments.is_finite else self._not_finite(x))
        return moments

    def _some_images(self, x: Tensor, pivot: Tensor) -> list[ImageMoments]:
        """Return the moments of the images that tell how images differ."""
        return [ImageMoments.of(x[part], pivot) for part in self._at.looked_at if part.start < len(x)]

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
        pooled = self.ranks.merge(own)
        self.check_finite(number, pooled)
        on_layer(len(self.order))
        settled = self.settle(number, pooled)
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
