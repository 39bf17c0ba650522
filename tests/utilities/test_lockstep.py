"""Passes of one model move side by side, one at a time, and none is left behind when one fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from finetune_bn.errors import FinetuneBNError
from finetune_bn.utilities.lockstep import (
    FINISHED,
    DifferentPaths,
    TooFewThreads,
    caller_settings,
    inside_a_pass,
    meet,
    run_in_lockstep,
    run_in_turns,
)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def visit(places: list[int], name: str, log: list[Any] | None = None) -> Callable[[], None]:
    """Return a pass that brings (name, place) to each place, and logs what it gets."""

    def job() -> None:
        for place in places:
            answer = meet(place, (name, place))
            if log is not None:
                log.append((name, place, answer))

    return job


def test_what_all_passes_bring_is_pooled_in_their_order_and_the_answer_goes_to_all() -> None:
    pooled: list[Any] = []
    log: list[Any] = []

    def pool(place: int, brought: list[Any]) -> Any:
        pooled.append((place, brought))
        return None if place == FINISHED else f"answer {place}"

    run_in_lockstep([visit([4, 2, 4], name, log) for name in "abc"], pool)
    assert pooled == [(place, [(name, place) for name in "abc"]) for place in (4, 2, 4)] + [(FINISHED, [])]
    assert log == [(name, place, f"answer {place}") for place in (4, 2, 4) for name in "abc"]


def test_no_two_passes_run_at_once() -> None:
    running = 0

    def job() -> None:
        nonlocal running
        for place in range(5):
            running += 1
            assert running == 1
            sum(range(20_000))  # long enough for another thread to be let in, were it waiting
            running -= 1
            meet(place, None)

    run_in_lockstep([job] * 4, lambda place, brought: None if place == FINISHED else 0)


def test_without_jobs_others_are_waited_for() -> None:
    left = [1, 1]

    def pool(place: int, brought: list[Any]) -> Any:
        assert place == FINISHED
        assert brought == []
        return left.pop() if left else None

    run_in_lockstep([], pool)
    assert left == []


@pytest.mark.parametrize("paths", [([0, 1], [0, 2]), ([0, 1], [0]), ([0], [0, 1]), ([], [0])])
def test_passes_on_different_paths_are_an_error(paths: tuple[list[int], list[int]]) -> None:
    with pytest.raises(DifferentPaths, match="mode='one_pass' does not need it"):
        run_in_lockstep([visit(path, str(number)) for number, path in enumerate(paths)], lambda place, brought: 0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_error_of_a_pass_reaches_the_caller_and_ends_the_others(error: type[BaseException]) -> None:
    log: list[Any] = []

    def fail() -> None:
        meet(0, None)
        raise error("in the second pass")

    with pytest.raises(error, match="in the second pass"):
        run_in_lockstep([visit([0, 1], "a", log), fail, visit([0, 1], "c", log)], lambda place, brought: place)
    assert log == [("a", 0, 0)]


def test_an_error_while_pooling_ends_all() -> None:
    def pool(place: int, brought: list[Any]) -> Any:
        raise FinetuneBNError("too few")

    with pytest.raises(FinetuneBNError, match="too few"):
        run_in_lockstep([visit([0], "a"), visit([0], "b")], pool)


def test_a_model_that_catches_every_exception_is_ended_all_the_same() -> None:
    went_on = []

    def stubborn() -> None:
        try:
            meet(0, None)
        except Exception:
            went_on.append(1)

    def fail() -> None:
        raise ValueError("before the first layer")

    with pytest.raises(ValueError, match="before the first layer"):
        run_in_lockstep([stubborn, fail], lambda place, brought: 0)
    assert went_on == []


def test_passes_have_the_autocast_of_the_caller_and_no_gradients() -> None:
    found: list[tuple[bool, Any, bool]] = []

    def job() -> None:
        found.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()))

    def pool(place: int, brought: list[Any]) -> None:
        return None

    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            run_in_lockstep([job, job], pool, caller_settings(torch.device("cpu")))
    assert found == [(False, torch.bfloat16, False)] * 2 + [(True, torch.bfloat16, False)] * 2
    assert torch.is_grad_enabled()
    run_in_lockstep([job], pool)
    assert found[-1][2] is True  # without settings: torch's own, not the caller's


def test_in_turns_each_runs_to_its_end_whatever_path_it_takes_and_whoever_fails() -> None:
    log: list[Any] = []

    def fail() -> None:
        meet(0, None)
        raise ValueError("in the second pass")

    errors = run_in_turns([visit([0, 1, 2], "a", log), fail, visit([5], "c", log)])
    assert [type(error) for error in errors] == [type(None), ValueError, type(None)]
    assert log == [("a", 0, None), ("c", 5, None), ("a", 1, None), ("a", 2, None)]
    assert run_in_turns([]) == []


def test_whether_the_caller_is_a_pass_is_known() -> None:
    found: list[bool] = []
    run_in_turns([lambda: found.append(inside_a_pass())])
    assert found == [True]
    assert not inside_a_pass()


@pytest.mark.parametrize("number", [1, 2, 4])
def test_where_a_thread_cannot_start_no_pass_has_begun_and_none_is_left(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = threading.Thread.start, [0]

    def refuse(thread: threading.Thread) -> None:
        started[0] += 1
        if started[0] == number:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    log: list[Any] = []
    for run in (lambda jobs: run_in_lockstep(jobs, lambda place, brought: None), run_in_turns):
        started[0] = 0
        with pytest.raises(TooFewThreads, match=rf"thread {number}: can't start new thread.*4 threads"):
            run([lambda: log.append(1)] * 4)
    assert log == []
