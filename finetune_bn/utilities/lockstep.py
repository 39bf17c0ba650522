"""Run several forward passes of one model side by side, so that all reach a layer before any goes on behind it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import torch

from finetune_bn.errors import FinetuneBNError, complaint

FINISHED = -1


# Passes that stand side by side at most: each has a thread, and holds its activations.
MOST_PASSES = 64


class NotSideBySide(FinetuneBNError):
    """The passes cannot run side by side; nothing was pooled that they all could use."""


class DifferentPaths(NotSideBySide):
    """The passes do not call the same layers in the same order, so there is nothing to pool."""


class TooFewThreads(NotSideBySide):
    """The system starts no further thread; no pass has begun."""


class _Cancelled(BaseException):
    """Ends a pass that waits at a layer; not an Exception, so that no model catches it."""


class _Pass:
    """One forward pass on a thread of its own; only one of them runs at any time."""

    def __init__(self, job: Callable[[], None], settings: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self.place = FINISHED
        self.brought: Any = None
        self.answer: Any = None
        self.error: BaseException | None = None
        self.cancelled = self.done = False
        self._job, self._settings = job, settings
        # Queues as semaphores: threading's own take eight times as long to hand over.
        self._go: SimpleQueue[None] = SimpleQueue()
        self._back: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Give the pass its thread, which waits for `proceed`."""
        self._thread.start()

    def proceed(self) -> None:
        """Let the pass run until it arrives at the next layer or ends."""
        self._go.put(None)
        self._back.get()
        if self.error is not None:
            raise self.error

    def wait_at(self, place: int, brought: Any) -> Any:
        """Called by the pass: stop at a layer, and return what was made of what all passes brought there."""
        self.place, self.brought = place, brought
        self._back.put(None)
        self._go.get()
        if self.cancelled:
            raise _Cancelled
        answer, self.answer = self.answer, None
        return answer

    def cancel(self) -> None:
        """End the pass where it waits."""
        if self._thread.is_alive():
            self.cancelled = True
            self._go.put(None)
            self._thread.join()

    def _run(self) -> None:
        self._go.get()
        try:
            if not self.cancelled:
                _CURRENT.of = self
                with self._settings():
                    self._job()
        except _Cancelled:
            pass
        except BaseException as error:
            self.error = error
        finally:
            _CURRENT.of = None
            self.place, self.brought, self.done = FINISHED, None, True
            self._back.put(None)


_CURRENT = threading.local()


def meet(place: int, brought: Any) -> Any:
    """Wait, in a pass that `run_in_lockstep` started, for the others to arrive at the layer of this number.

    Args:
        place: the layer's number, the same in all passes.
        brought: what this pass adds.

    Returns:
        What `pool` returned for the layer.
    """
    current: _Pass = _CURRENT.of
    return current.wait_at(place, brought)


def inside_a_pass() -> bool:
    """Whether the calling thread is one that was started here for a forward pass."""
    return getattr(_CURRENT, "of", None) is not None


def run_in_lockstep(
    jobs: Sequence[Callable[[], None]],
    pool: Callable[[int, list[Any]], Any],
    settings: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> None:
    """Run the jobs together; at each layer `pool` gets what all of them brought, and its answer goes to all.

    The jobs take turns: no two run at once, so a model that is not thread-safe comes to no harm, and the result does
    not depend on timing. Each has a thread only because a forward pass that waits needs a stack of its own.

    Args:
        jobs: forward passes; inside them layers call `meet`.
        pool: called with the number of a layer and what the jobs brought, in the order of the jobs; and at the end
            with `FINISHED` and an empty list. While it returns something else than None for that, it is called on
            (other processes are not through yet).
        settings: opened around each job in its thread, for what torch keeps per thread (gradient mode, autocast).

    Raises:
        DifferentPaths: the jobs arrived at different layers.
        TooFewThreads: there is no thread for one of the jobs; none has begun.
    """
    with _started(jobs, settings) as passes:
        for each in passes:
            each.proceed()
        while True:
            places = {each.place for each in passes} or {FINISHED}
            if len(places) > 1:
                raise DifferentPaths(
                    complaint(
                        "mode",
                        "exact",
                        "a model that calls its layers in the same order for every batch",
                        "This one does not; mode='one_pass' does not need it.",
                    )
                )
            place = places.pop()
            answer = pool(place, [each.brought for each in passes] if place != FINISHED else [])
            if place == FINISHED:
                if answer is None:
                    return
                continue
            for each in passes:
                each.answer, each.brought = answer, None
            for each in passes:
                each.proceed()


def run_in_turns(
    jobs: Sequence[Callable[[], None]],
    settings: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> list[BaseException | None]:
    """Run each job to its end, in turns from one `meet` to the next, wherever that is; `meet` returns None.

    Args:
        jobs: forward passes.
        settings: opened around each job in its thread.

    Returns:
        For each job the error that ended it, or None; the others go on.

    Raises:
        TooFewThreads: there is no thread for one of the jobs; none has begun.
    """
    with _started(jobs, settings) as passes:
        while not all(each.done for each in passes):
            for each in passes:
                if not each.done:
                    with contextlib.suppress(Exception):
                        each.proceed()
        return [each.error for each in passes]


@contextlib.contextmanager
def _started(
    jobs: Sequence[Callable[[], None]], settings: Callable[[], contextlib.AbstractContextManager[Any]]
) -> Iterator[list[_Pass]]:
    """Give each job a thread that waits; at the end, or where one cannot be started, end those that wait."""
    passes: list[_Pass] = []
    try:
        for job in jobs:
            each = _Pass(job, settings)
            try:
                each.start()
            except RuntimeError as error:
                allowed = f"a system that starts {len(jobs)} threads"
                remedy = "mode='one_pass' or larger batches need fewer."
                raise TooFewThreads(complaint("mode", f"thread {len(passes) + 1}: {error}", allowed, remedy)) from error
            passes.append(each)
        yield passes
    finally:
        for each in passes:
            each.cancel()


def caller_settings(device: torch.device) -> Callable[[], contextlib.ExitStack]:
    """Return what opens the caller's autocast, device and stream in another thread, without gradients.

    Torch keeps all of these per thread. Autocast is the caller's at the time of this call.
    """
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def settings() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(torch.no_grad())
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))
        stack.enter_context(torch.autocast(device.type, dtype=dtype, enabled=enabled))
        return stack

    return settings
