"""One recalibration, from the first batch to the statistics that are to be written."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from finetune_bn.errors import BadData, complaint
from finetune_bn.functional.image_spread import ImageSpread, standard_error
from finetune_bn.functional.moments import Moments, merge_all
from finetune_bn.layers.statistics import Statistics
from finetune_bn.recalibration.collector import PIECE, Collector, cut
from finetune_bn.recalibration.iid_test import Membership
from finetune_bn.recalibration.measured_layer import MeasuredLayer
from finetune_bn.recalibration.rehearsal import Findings, Rehearsal
from finetune_bn.recalibration.settings import RecalibrationSettings
from finetune_bn.utilities.batches import Chunk, Feeder, Stock, grouped
from finetune_bn.utilities.device_memory import available_memory, bytes_alive_at
from finetune_bn.utilities.lockstep import MOST_PASSES, NotSideBySide, TooFewThreads, caller_settings
from finetune_bn.utilities.module_state import ModuleState
from finetune_bn.utilities.processes import Ranks
from finetune_bn.utilities.progress import Report, progress_bar

# The share of the free memory for activations that wait, and how many images one pass normalizes together at most.
_SHARE_OF_MEMORY, _LARGEST_CHUNK = 0.5, 1024
# With a tolerance: so many images tell how many it takes; and a little more than they tell, so as not to miss it.
_PILOT, _MARGIN = 64, 1.02
# Below this p-value a loader is said not to be i.i.d.: one false alarm in a thousand.
_SUSPICIOUS = 1e-3
# What the processes tell each other before a step: images, whether there are more, too many to wait, and all counted.
_WIDTH = 4


class Measuring:
    """Measures the statistics of batches in chosen layers of a model; writes nothing.

    Args:
        model: the model, in eval mode.
        layers: the layers that measure.
        settings: what and for how long.
        feeder: passes batches to the model.
        group: the processes whose data are pooled.

    Attributes:
        exact: whether all images are normalized by their common statistics.
        images: images measured, of all processes.
        warnings: what a user should know of the data.
        pooled: moments and spread of each layer, of all processes.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[MeasuredLayer],
        settings: RecalibrationSettings,
        feeder: Feeder,
        group: torch.distributed.ProcessGroup | None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.settings = settings
        self.feeder = feeder
        self.ranks = Ranks(group, feeder.device)
        self.collector = Collector(layers, feeder, self.ranks, self._settled, settings.how == "preserve")
        self.exact = settings.mode != "one_pass" and settings.how != "preserve"
        self.images = 0
        self.warnings: list[str] = []
        self.pooled: list[tuple[Moments, ImageSpread]] = []
        self._membership = Membership()
        self._waiting: list[Chunk] = []
        self._kinds = 0
        self._last_key: tuple[Any, ...] | None = None
        self._counted = True
        self._mixing: tuple[str, ...] | None = None
        self._groups = 0
        self._per_image = 0.0
        self._budget = self._expected = 0
        self._caller_settings = caller_settings(feeder.device)

    def run(self, batches: Iterable[Any], state: ModuleState, progress: bool | None) -> None:
        """Measure until the batches end, or the limit or the tolerance is reached.

        Args:
            batches: the batches.
            state: what the modules of the model hold now, to begin with anew.
            progress: show a progress bar; None: on a terminal.

        Raises:
            FinetuneBNError: there are too few images, or NaN and infinite values among the activations.
        """
        self._state = state
        stock = Stock(batches, self.feeder, self._share(self.settings.max_samples))
        target = None if self.settings.tolerance is None else _PILOT
        total = len(self.layers) if self.exact else self.settings.max_samples
        unit = "layers" if self.exact else "images"
        with progress_bar("Recalibrating BatchNorm", unit, total, progress) as report:
            self._rehearse(stock)
            while True:
                self._take(stock, target, report)
                rows = self.ranks.agree(stock.images, stock.exhausted, self._too_much(stock.images), not self._counted)
                self.images = int(sum(row[0] for row in rows))
                if not self.images:
                    raise BadData(complaint("batches", "no batch", "at least one batch with images"))
                self._counted = not any(row[3] for row in rows)
                if any(row[2] for row in rows):
                    if self._kinds > MOST_PASSES:
                        self.warnings.append(
                            f"more than {MOST_PASSES} batches that cannot be joined: mode='one_pass' was used, and "
                            "each was normalized by its own statistics. Larger batches come nearer to those of all"
                        )
                    self.exact = False  # what waits goes through one by one, and so does all that follows
                    continue
                if self.exact and not self._in_lockstep(report):
                    continue
                self._pool()
                if self._enough(exhausted=all(row[1] for row in rows)):
                    break
                target = self._next_target()
            self._tell()
            self._look_at_batches()

    def statistics(self) -> list[Statistics | None]:
        """Return what each layer is to normalize by from now on; None for a layer at which nothing arrived."""
        return [
            self._settled(number, moments) if moments.count else None for number, (moments, _) in enumerate(self.pooled)
        ]

    def standard_error(self, number: int) -> float:
        """Return the standard error of a layer's statistics; NaN where too few images tell."""
        moments, spread = self.pooled[number]
        variance = spread.variance_per_image(moments.mean, moments.var(), self.layers[number].before.eps)
        return math.nan if variance is None else standard_error(variance, self.images)

    @property
    def largest_error(self) -> float:
        """The largest standard error of a layer; NaN where too few images tell."""
        errors = [self.standard_error(i) for i, (moments, _) in enumerate(self.pooled) if moments.count]
        return math.nan if any(map(math.isnan, errors)) else max(errors, default=math.nan)

    def _rehearse(self, stock: Stock) -> None:
        """Find out by a few images whether batches can be cut, and passes stand side by side."""
        settings, found = self.settings, Findings()
        side_by_side = self.exact or self.collector.cut_up
        try:
            chunks = stock.first(2)
            if len(chunks) > 1 or (chunks and len(cut(chunks, self.feeder.device)) > 1):
                rehearsal = Rehearsal(self.layers, self.feeder, self._state, self._caller_settings)
                found = rehearsal.look(chunks, keep=settings.keep_batches, side_by_side=side_by_side)
        except BaseException:
            self.ranks.fail(_WIDTH)
            raise
        self.collector.in_order = found.in_order
        rows = self.ranks.agree(found.parts_differ, found.passes_mix, 0, 0)
        if any(row[0] for row in rows):
            stock.keep_batches()
            self.warnings.append(
                "layers see something else in a part of a batch than in the whole, so batches were kept as they came. "
                "Say so by keep_batches=True where that is meant (clips x frames, bags, time first)"
            )
        if any(row[1] for row in rows):
            self._mixing = found.kept_in
            self.exact = self.collector.cut_up = False

    def _tell(self) -> None:
        """Warn of what was found of model and batches."""
        if self._mixing is not None:
            self._state.restore(outside=True)
            where = ", ".join(self._mixing[:6]) or "something outside of its modules"
            chunks = f"{self._groups} chunks, each normalized by its own statistics"
            self.warnings.append(
                f"the model keeps something between its layers ({where}), which a pass beside it would disturb: the "
                f"images went through it {'all at once' if self._groups == 1 else 'in ' + chunks}"
            )
        if not self._counted:
            self.warnings.append("nothing tells how many images a batch holds: each counts as one")

    def _take(self, stock: Stock, target: int | None, report: Report) -> None:
        """Take chunks from the stock: for `exact` they wait, for the others they go through the model."""
        try:
            share = self._share(target)
            fresh = stock.up_to(math.inf if share is None else share)
            first = next(fresh, None)
            if first is not None and not self._budget and self._memory_decides():
                self._weigh(first)
            self._expected = stock.expected * self.ranks.world
            chunks = self._seen(itertools.chain([] if first is None else [first], fresh))
            if self.exact:
                for chunk in chunks:
                    self._waiting.append(chunk)
                    if self._too_much(stock.images):
                        break
                return
            waiting, self._waiting = self._waiting, []
            as_kernel = self.settings.part == "both" and not self.settings.prior
            done = 0
            for group in grouped(itertools.chain(waiting, chunks), self._chunk_size()):
                self._begin_anew()
                if self._groups:
                    self._membership.forget()
                with contextlib.nullcontext() if self._groups else self._watching():
                    self.collector.one_by_one(group, as_kernel=as_kernel)
                self._groups += 1
                done += sum(map(len, group))
                report(done, "")
        except BaseException:
            self.ranks.fail(_WIDTH)
            raise

    def _begin_anew(self) -> None:
        """Give the modules what they held at the beginning: what they keep is no business of the next images'.

        Batches that stay as they come are calls as the user makes them, one after the other.
        """
        if not (self._groups and self.feeder.keep):
            self._state.restore(outside=self._mixing is not None)

    def _seen(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            self._membership.see(chunk)
            self._counted = self._counted and chunk.counted
            key = chunk.shape_key
            self._kinds += key is None or key != self._last_key
            self._last_key = key
            yield chunk

    def _watching(self) -> contextlib.AbstractContextManager[None]:
        """Compare batches by what the layers see of them in one group, or in lock-step."""
        return self._membership.watching([layer.module for layer in self.layers], lambda: self.collector.current)

    def _in_lockstep(self, report: Report) -> bool:
        """Run what waits; False where the model takes different paths, and one pass is to be tried instead."""
        note = f"of {self.images} images"
        self._begin_anew()
        try:
            with self._watching():
                pieces = cut(self._waiting, self.feeder.device)
                self.collector.together(pieces, lambda done: report(done, note))
        except NotSideBySide as error:
            if self.settings.mode == "exact" or self.ranks.world > 1:
                raise
            why = "there are too few threads" if isinstance(error, TooFewThreads) else "the model takes different paths"
            self.warnings.append(f"{why} for different batches: mode='one_pass' was used")
            self.exact = False
            self.collector.forget()
            self._membership.forget()
            return False
        return True

    def _pool(self) -> None:
        """Merge what the processes have measured, and look whether all of it is finite."""
        packed = [torch.cat([layer.moments.pack(), layer.spread.pack()]) for layer in self.layers]
        everyone = self.ranks.gather(torch.cat(packed))
        sizes = [len(p) for p in packed]
        self.pooled = []
        for parts in zip(*(torch.split(numbers, sizes) for numbers in everyone), strict=True):
            cut = 1 + 2 * ((len(parts[0]) - 2) // 8)
            moments = merge_all(Moments.unpack(p[:cut]) for p in parts)
            spread = functools.reduce(ImageSpread.merge, (ImageSpread.unpack(p[cut:]) for p in parts))
            self.pooled.append((moments, spread))
        for number in self.collector.order or range(len(self.layers)):
            self.collector.check_finite(number, self.pooled[number][0])

    def _enough(self, *, exhausted: bool) -> bool:
        tolerance = self.settings.tolerance
        reached = tolerance is None or self.largest_error <= tolerance
        if not reached and not exhausted:
            return False
        if self._too_few():
            raise BadData(
                complaint(
                    "batches",
                    f"{self.images} images",
                    f"at least min_samples={self.settings.min_samples}",
                    "Statistics of so few are noise: pass more, or mix them with the source's by prior=16.",
                )
            )
        if not reached and math.isnan(self.largest_error):
            self.warnings.append("the standard error is not known: in some layers a row of values is not an image")
        elif not reached:
            self.warnings.append(
                f"the standard error is {self.largest_error:.4f} and not {tolerance}: there were only "
                f"{self.images} images, and it would take about {self._next_target(most=math.inf)}"
            )
        return True

    def _too_few(self) -> bool:
        if self._counted:
            return self.images < self.settings.min_samples
        # Where nobody knows the number of images, so many values of a channel are asked for.
        return min(moments.count for moments, _ in self.pooled if moments.count) < self.settings.min_samples

    def _next_target(self, most: float = 4) -> int:
        """Return how many images it takes by what is known now; not more than `most` times those there are."""
        assert self.settings.tolerance is not None
        error = self.largest_error
        factor = most if math.isnan(error) else (error / self.settings.tolerance) ** 2 * _MARGIN
        return math.ceil(max(self.images + 1, self.images * min(factor, most)))

    def _settled(self, number: int, measured: Moments) -> Statistics:
        """Return by what a layer is to normalize, from what was measured and what it had."""
        before, settings = self.layers[number].before, self.settings
        if measured.count < 2:
            raise BadData(
                complaint(
                    "batches",
                    f"one value for each channel of layer {self.layers[number].name!r}",
                    "two or more: a variance needs them",
                )
            )
        mean, var = measured.mean, measured.var(correction=1)
        source_mean, source_var = before.mean.double(), before.var.double()
        images = self.images or self._expected or 1
        share = settings.prior / (settings.prior + images)
        if share:
            between = (source_mean - mean).square()
            var = share * source_var + (1 - share) * var + share * (1 - share) * between
            mean = share * source_mean + (1 - share) * mean
        if settings.part == "mean":
            var = source_var
        if settings.part == "var":
            mean = source_mean
        return before.moved_to(mean, var, preserve=settings.how == "preserve")

    def _memory_decides(self) -> bool:
        settings = self.settings
        chunks = settings.mode == "one_pass" or self._mixing is not None
        return settings.how != "preserve" and (settings.mode == "auto" or (chunks and settings.batch_size is None))

    def _weigh(self, chunk: Chunk) -> None:
        """Find out how much memory an image takes that waits, and how much there is."""
        part = chunk[:2] if chunk.shape_key is not None else chunk
        with self._caller_settings():
            alive = bytes_alive_at([layer.module for layer in self.layers], lambda: self.feeder(part))
        inputs = sum(leaf.nbytes for leaf in tree_leaves(part.content) if torch.is_tensor(leaf))
        self._per_image = (alive + inputs) / len(part)
        self._budget = self.settings.memory or int(_SHARE_OF_MEMORY * available_memory(self.feeder.device))

    def _too_much(self, images: int) -> bool:
        if not self.exact or self.settings.mode != "auto":
            return False
        # What cannot be joined is a pass each.
        return images * self._per_image > self._budget or self._kinds > MOST_PASSES

    def _chunk_size(self) -> int:
        if self.settings.how == "preserve":
            return self.settings.batch_size or PIECE
        # What waits at a layer is there three times over while one chunk passes it: before, behind and in between.
        fit = int(self._budget / max(3 * self._per_image, 1))
        most = _LARGEST_CHUNK if self._mixing is None else fit
        return self.settings.batch_size or max(1, min(fit, most))

    def _share(self, images: int | None) -> int | None:
        """Return how many of so many images are this process's to take."""
        if images is None or self.ranks.world == 1:
            return images
        rank = torch.distributed.get_rank(self.ranks.group)
        return images // self.ranks.world + (rank < images % self.ranks.world)

    def _look_at_batches(self) -> None:
        """Warn of a loader whose batches are not i.i.d."""

        def run(chunk: Chunk) -> None:
            with self._caller_settings():
                self.feeder(chunk)

        p = self._membership.p_value(run, [layer.module for layer in self.layers])
        if p is None or p > _SUSPICIOUS:
            return
        consequence = (
            "What was pooled is right for all images together, in whatever order; with max_samples or a tolerance, "
            "only for those that came first."
            if self.exact or self.settings.how == "preserve" or self._groups == 1
            else "Layers behind the first were normalized by such chunks, so their statistics are off: shuffle."
        )
        self.warnings.append(
            f"the batches are not i.i.d. (permutation test: p = {p:.4f}): images of one batch resemble each other, as "
            f"in a loader that is sorted by class, draws P labels x K images or goes from domain to domain. "
            f"{consequence} For several domains keep statistics of each (StatisticsBank)."
        )
