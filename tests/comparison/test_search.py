"""Which trainings are made: thirds go on, grids grow at their edge, failures are passed over."""

from __future__ import annotations

import math

import pytest

from finetune_bn.comparison.budget import Speed, steps_within
from finetune_bn.comparison.search import (
    MOST_EXTENSIONS,
    Search,
    lengths_up_to,
    steps_in_all,
    survivors,
    trainings_in_all,
)
from finetune_bn.comparison.training import Outcome, Trial
from finetune_bn.errors import FinetuneBNError


def outcome(score: float | None, loss: float = 1.0) -> Outcome:
    return Outcome(score, ((1, loss),), 1.0, None if score is not None else "why")


def by_distance(best: dict[str, float], height: dict[str, float]):  # type: ignore[no-untyped-def]
    """Return a `run` whose score is the arm's height less the distance to its best rate, and the list of its calls."""
    calls: list[Trial] = []

    def run(trial: Trial) -> Outcome:
        calls.append(trial)
        return outcome(height[trial.arm] - 0.1 * abs(math.log10(trial.lr / best[trial.arm])))

    return run, calls


def test_lengths_are_thirds_down_to_the_shortest_that_tells_anything() -> None:
    assert lengths_up_to(300) == (33, 100, 300)
    assert lengths_up_to(59) == (59,)
    assert lengths_up_to(60) == (20, 60)
    assert lengths_up_to(5) == (5,)


def test_a_third_goes_on_and_the_steps_are_counted_as_they_are_made() -> None:
    best = dict.fromkeys("abc", 1e-3)
    run, calls = by_distance(best, {"a": 0.5, "b": 0.6, "c": 0.9})
    rates = dict.fromkeys("abc", (1e-4, 1e-3, 1e-2))
    search = Search(rates, (0, 1), (20, 60), run)
    search.go()
    assert survivors(9) == 3
    assert [(t.arm, t.lr) for t in calls if t.steps == 60] == [("c", lr) for lr in (1e-4, 1e-3, 1e-2) for _ in (0, 1)]
    assert {t.seed for t in calls if t.steps == 20} == {0}
    assert len(calls) == trainings_in_all(9, 2, 60)
    assert sum(t.steps for t in calls) == steps_in_all(9, 2, 60)
    assert set(search.dropped) == {(arm, lr) for arm in "ab" for lr in (1e-4, 1e-3, 1e-2)}
    runs = search.runs()
    assert [r.dropped_at for r in runs if r.arm == "c"] == [None] * 6
    assert all(r.dropped_at == 20 for r in runs if r.arm == "a")


def test_a_grid_grows_to_the_side_of_its_best_rate_until_that_is_inside() -> None:
    run, calls = by_distance({"a": 1e-5, "b": 1e-3}, {"a": 0.9, "b": 0.9})
    search = Search({"a": (1e-3, 1e-2), "b": (1e-4, 1e-3, 1e-2)}, (0,), (20,), run)
    search.go()
    assert sorted({t.lr for t in calls if t.arm == "a"}) == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
    assert sorted({t.lr for t in calls if t.arm == "b"}) == [1e-4, 1e-3, 1e-2]
    assert search.notes == []


def test_a_grid_that_ends_at_its_edge_after_all_says_so() -> None:
    run, calls = by_distance({"a": 1e3}, {"a": 0.9})
    search = Search({"a": (1e-3, 1e-2)}, (0,), (20,), run)
    search.go()
    assert len(calls) == 2 + MOST_EXTENSIONS
    assert search.notes == ["a: its best learning rate, 10, is the largest that was tried"]


def test_rates_that_are_equally_good_or_alone_are_no_reason_to_grow() -> None:
    calls: list[Trial] = []

    def run(trial: Trial) -> Outcome:
        calls.append(trial)
        return outcome(0.5)

    Search({"a": (1e-3, 1e-2), "b": (1e-3,)}, (0,), (20,), run).go()
    assert len(calls) == 3


def test_failed_trainings_do_not_go_on_and_of_equal_scores_the_lower_loss_does() -> None:
    table = {"a": outcome(None), "b": outcome(0.5, 2.0), "c": outcome(0.5, 1.0)}
    calls: list[Trial] = []

    def run(trial: Trial) -> Outcome:
        calls.append(trial)
        return table[trial.arm]

    search = Search(dict.fromkeys("abc", (1e-3,)), (0,), (20, 60), run)
    search.go()
    assert [t.arm for t in calls if t.steps == 60] == ["c"]
    assert [r.failed for r in search.runs()] == ["why", None, None]
    everything_fails = Search({"a": (1e-3, 1e-2)}, (0,), (20, 60), lambda trial: outcome(None))
    everything_fails.go()
    assert len(everything_fails.runs()) == 2


def test_the_longest_training_that_fits_the_seconds_is_taken_and_too_few_seconds_are_refused() -> None:
    speed = Speed(step=0.01, rest=0.1)
    for seconds in (10.0, 60.0):
        steps = steps_within(seconds, speed, 8, 1, 5000)
        spent = steps_in_all(8, 1, steps) * speed.step + trainings_in_all(8, 1, steps) * speed.rest
        assert 0.6 * seconds < 1.25 * spent <= seconds
    assert steps_within(1e9, speed, 8, 1, 700) == 700
    with pytest.raises(FinetuneBNError, match=r"seconds: got 1\.0; allowed: at least \d+, for 8 trainings of 20 steps"):
        steps_within(1.0, speed, 8, 1, 5000)
