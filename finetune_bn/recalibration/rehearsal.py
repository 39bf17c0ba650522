"""Try with a few images what a recalibration takes for granted: that batches can be cut, and passes stand side by side.

A network that stores something in one module and reads it in another (a counter that picks the next layer, a skip
connection kept by a hook) finds another pass's value there; one whose first dimension is not images sees other things
in a part of a batch than in the whole.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetune_bn.functional.moments import Moments
from finetune_bn.layers.statistics import Statistics, normalize
from finetune_bn.recalibration.measured_layer import MeasuredLayer
from finetune_bn.utilities.batches import Chunk, Feeder, join
from finetune_bn.utilities.lockstep import meet, run_in_turns
from finetune_bn.utilities.module_state import ModuleState
from finetune_bn.utilities.randomness import RandomStates

# Images of each part that goes through the model.
_IMAGES = 2
# So many values of a layer's input are kept for comparison, where the parts are whole batches.
_VALUES = 1 << 20
# How far what arrives at a layer may differ, in standard deviations of a channel: where the same operations run on the
# same shapes; where shapes differ, and so kernels; where they round to TF32; and where they round to half precision.
_SAME, _ROUNDED, _COARSE, _HALF = 1e-3, 1e-2, 0.1, 0.3


@dataclass(frozen=True)
class Findings:
    """What was found.

    Attributes:
        parts_differ: layers see other things in a part of a batch than in the whole, or the model fails on it.
        passes_mix: a pass is disturbed by one beside it, or by what one before it left in closures or globals.
        kept_in: attributes, buffers and variables in which the model keeps something within a pass.
        kept_outside: whether that is not in its modules alone, which copies of it do not share.
        in_order: numbers of the layers at which images arrive one after the other, each with as many rows.
    """

    parts_differ: bool = False
    passes_mix: bool = False
    kept_in: tuple[str, ...] = ()
    kept_outside: bool = False
    in_order: frozenset[int] = frozenset()


@dataclass
class _Trace:
    """What arrived at layers in one pass: number of the layer, input (or a part of it), what it was normalized by."""

    numbers: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    statistics: list[Statistics] = field(default_factory=list)
    thin: bool = False


class Rehearsal:
    """Passes a few images through a model, together and in parts, one after the other and side by side.

    Each layer normalizes by the statistics of these images. No pass is broken off: it runs to its end, and before each
    the model's modules hold what they held at the beginning.

    Args:
        layers: the layers that are to measure.
        feeder: passes chunks to the model.
        state: what the modules hold at the beginning.
        settings: the caller's, opened around each pass.
    """

    def __init__(
        self,
        layers: Sequence[MeasuredLayer],
        feeder: Feeder,
        state: ModuleState,
        settings: Callable[[], contextlib.ExitStack],
    ) -> None:
        self._layers, self._feeder, self._state, self._settings = layers, feeder, state, settings
        self._random = RandomStates(feeder.device)
        self._outside = False
        self._traces: list[_Trace] = []
        self._in_order: frozenset[int] = frozenset()

    def look(self, chunks: Sequence[Chunk], *, keep: bool | None, side_by_side: bool) -> Findings:
        """Tell what the first chunks show.

        Args:
            chunks: the first one or two, as they came.
            keep: whether batches stay as they come; None: where it turns out that they have to.
            side_by_side: whether passes are to stand side by side.
        """
        try:
            parts_differ = keep is None and self._parts_differ(chunks)
            if parts_differ:
                self._traces = []
            whole = keep or parts_differ
            parts = list(chunks) if whole else self._parts(chunks)
            mix = self._outside
            if not mix and side_by_side and len(parts) > 1:
                mix = self._mix(parts, self._traces or [self._alone(part, thin=True) for part in parts])
            if not mix:
                return Findings(parts_differ, in_order=self._in_order)
            self._outside = True
            return Findings(parts_differ, True, *self._kept_in(parts[0]), self._in_order)
        finally:
            self._begin_anew()

    def _parts(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Return two parts of the chunks; fewer where there is no more."""
        first = chunks[0]
        if first.shape_key is not None and len(first) >= 2 * _IMAGES:
            return [first[:_IMAGES], first[_IMAGES : 2 * _IMAGES]]
        if len(chunks) > 1:
            return [chunk[:_IMAGES] if chunk.shape_key is not None else chunk for chunk in chunks[:2]]
        return [first[:1], first[1:]] if first.shape_key is not None and len(first) > 1 else [first]

    def _parts_differ(self, chunks: Sequence[Chunk]) -> bool:
        """Whether the layers see something else in two parts of a batch than in both joined."""
        parts = self._parts(chunks)
        if len(parts) < 2 or len({part.shape_key for part in parts}) > 1 or parts[0].shape_key is None:
            return False
        try:
            both = self._alone(join(parts))
            found = self._traces = [self._alone(part, by=both) for part in parts]
        except Exception:
            self._begin_anew()
            with self._settings():
                self._feeder(chunks[0])  # raises what the model has to say of a batch as it came
            return True
        if self._alike(both, found):
            return False
        # It may be that closures or globals change from call to call, and not that the parts differ.
        self._outside = True
        both = self._alone(join(parts))
        found = [self._alone(part, by=both) for part in parts]
        if self._alike(both, found):
            return False
        self._outside = False
        # What draws at random, also in eval mode, draws something else for one image and for two.
        again = self._alone(parts[0], by=both, seed=1)
        return self._same(found[0], again)

    def _alike(self, both: _Trace, parts: Sequence[_Trace]) -> bool:
        if any(part.numbers != both.numbers for part in parts):
            return False
        disordered: set[int] = set()
        for i, (number, x) in enumerate(zip(both.numbers, both.inputs, strict=True)):
            found, eps = [part.inputs[i] for part in parts], self._layers[number].before.eps
            if not _come_in_order(x, found, _limit(x), eps):
                disordered.add(number)
                if not _hold_the_same(x, found, _limit(x), eps):
                    return False
        self._in_order = frozenset(both.numbers) - disordered
        return True

    def _same(self, one: _Trace, other: _Trace) -> bool:
        if one.numbers != other.numbers:
            return False
        each = zip(one.numbers, one.inputs, other.inputs, strict=True)
        return all(_near(a, b, _limit(a), self._layers[number].before.eps) for number, a, b in each)

    def _begin_anew(self) -> None:
        self._state.restore(outside=self._outside)
        self._random.restore()

    def _alone(
        self,
        chunk: Chunk,
        *,
        by: _Trace | None = None,
        thin: bool = False,
        seed: int | None = None,
        look: Callable[[], None] | None = None,
    ) -> _Trace:
        """Run one pass, normalized by the statistics of another or by its own; `thin` keeps a part of large inputs."""
        trace = _Trace(thin=thin)

        def arrive(number: int, x: Tensor) -> Tensor:
            call = len(trace.numbers)
            known = by is not None and call < len(by.numbers) and by.numbers[call] == number
            statistics = by.statistics[call] if known and by is not None else self._own(number, x)
            trace.numbers.append(number)
            trace.inputs.append(_thin(x) if thin else x.detach().clone())  # it may be changed in place later
            trace.statistics.append(statistics)
            if look is not None:
                look()
            return normalize(self._layers[number].module, x, statistics)

        self._begin_anew()
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if self._feeder.device.type == "cuda":
                torch.cuda.default_generators[self._feeder.device.index or 0].manual_seed(seed)
        with patched([layer.module for layer in self._layers], arrive), self._settings():
            self._feeder(chunk)
        return trace

    def _mix(self, parts: Sequence[Chunk], traces: Sequence[_Trace]) -> bool:
        """Whether a pass sees something else when the others take their turns between its layers."""
        at = threading.local()
        differ = False

        def run(part: Chunk, trace: _Trace) -> None:
            at.trace, at.call = trace, 0
            self._random.restore()
            self._feeder(part)
            nonlocal differ
            differ = differ or at.call != len(trace.numbers)

        def arrive(number: int, x: Tensor) -> Tensor:
            nonlocal differ
            trace, call = at.trace, at.call
            at.call += 1
            known = call < len(trace.numbers) and trace.numbers[call] == number
            if known and not differ:
                reference, eps = trace.inputs[call], self._layers[number].before.eps
                differ = not _near(_thin(x) if trace.thin else x, reference, _SAME, eps)
            differ = differ or not known
            random = RandomStates(self._feeder.device)
            meet(number, None)
            random.restore()
            return normalize(self._layers[number].module, x, trace.statistics[call] if known else self._own(number, x))

        self._begin_anew()
        jobs = [partial(run, part, trace) for part, trace in zip(parts, traces, strict=True)]
        with patched([layer.module for layer in self._layers], arrive):
            errors = run_in_turns(jobs, self._settings)
        return differ or any(error is not None for error in errors)

    def _kept_in(self, part: Chunk) -> tuple[tuple[str, ...], bool]:
        found: dict[str, None] = {}
        inside: set[str] = set()

        def look() -> None:
            found.update(dict.fromkeys(self._state.changes()))
            inside.update(self._state.changes(outside=False))

        self._begin_anew()
        self._alone(part, look=look)
        return tuple(found), not found or bool(found.keys() - inside)

    def _own(self, number: int, x: Tensor) -> Statistics:
        before = self._layers[number].before
        if x.numel() < 2 * x.shape[1]:
            return before
        moments = Moments.of(x)
        return before.moved_to(moments.mean, moments.var(), preserve=False)


@contextlib.contextmanager
def patched(modules: Sequence[nn.Module], arrive: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Let the layers compute by `arrive(number, input)`; their hooks go on as they were."""

    def forward(number: int, module: nn.Module, x: Tensor) -> Tensor:
        check: Any = getattr(module, "_check_input_dim", None)
        if check is not None:
            check(x)
        return arrive(number, x)

    try:
        for number, module in enumerate(modules):
            module.forward = partial(forward, number, module)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def _limit(x: Tensor) -> float:
    if x.dtype in (torch.float16, torch.bfloat16):
        return _HALF
    return _COARSE if x.is_cuda else _ROUNDED


def _thin(x: Tensor) -> Tensor:
    """Return a copy of `x` [N, C, ...] as [1, C, n], of some of the values where there are very many."""
    columns = x.detach().movedim(1, 0).flatten(1)
    step = -(-x.numel() // _VALUES) if x.numel() > _VALUES else 1
    return columns[None, :, ::step].clone()


def _come_in_order(whole: Tensor, parts: Sequence[Tensor], limit: float, eps: float) -> bool:
    """Whether the parts are the whole one after the other, as many rows each."""
    if len({part.shape for part in parts}) > 1 or any(part.shape[1:] != whole.shape[1:] for part in parts):
        return False
    return _near(torch.cat(list(parts)), whole, limit, eps)


def _hold_the_same(whole: Tensor, parts: Sequence[Tensor], limit: float, eps: float) -> bool:
    """Whether the parts hold the values of the whole, channel by channel, in any order."""
    columns = [t.movedim(1, 0).flatten(1) for t in (whole, *parts)]
    if sum(part.numel() for part in parts) != whole.numel() or len({len(each) for each in columns}) > 1:
        return False
    ordered = [each.float().sort(1).values.T for each in (columns[0], torch.cat(columns[1:], 1))]
    return _near(ordered[1], ordered[0], limit, eps)


def _near(x: Tensor, reference: Tensor, limit: float, eps: float) -> bool:
    """Whether no channel differs, root mean square, by more than `limit` of its standard deviations."""
    if x.shape != reference.shape:
        return False
    if torch.equal(x, reference) or not x.numel():
        return True
    a, b = (t.double().nan_to_num(0.0, 0.0, 0.0).movedim(1, 0).flatten(1) for t in (x, reference))
    mean = b.mean(1)
    # Rounding is relative to the mean, where that is far larger than what varies.
    spread = b.var(1, correction=0) + 1e-6 * mean.square() + eps
    spread = spread.clamp_min(torch.finfo(torch.float32).tiny)
    return bool(((a - b).square().mean(1) / spread).max().sqrt() <= limit)
