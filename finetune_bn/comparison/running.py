"""Make the trainings of a comparison, or take them from its folder, and put the result together."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from finetune_bn.comparison.arms import Arm
from finetune_bn.comparison.budget import Speed, in_words, measure_speed, steps_within
from finetune_bn.comparison.feed import count
from finetune_bn.comparison.live_table import live_table
from finetune_bn.comparison.result import Comparison
from finetune_bn.comparison.search import Search, lengths_up_to, trainings_in_all
from finetune_bn.comparison.store import Store, fingerprint_of
from finetune_bn.comparison.training import Outcome, Trial, Workbench, fine_tune
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.checks import number
from finetune_bn.utilities.randomness import RandomStates

log = logging.getLogger("finetune_bn")

MOST_STEPS = 5000  # of a training, where a time budget decides; a comparison is no training


def run_comparison(
    bench: Workbench,
    arms: Mapping[str, Arm],
    rates: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    *,
    steps: int | None,
    seconds: float | None,
    metric: str,
    sizes: tuple[int, int],
    data: str,
    functions: Sequence[str] = (),
    most_steps: int = MOST_STEPS,
    extend: bool = True,
    folder: str | Path | None = None,
    progress: bool | None = None,
    say: Callable[[str], object] = log.info,
    speed: Speed | None = None,
) -> Comparison:
    """Make the trainings of a comparison, or take them from a folder, and return the result.

    Args:
        bench: model, data and functions.
        arms: the treatments by name.
        rates: the learning rates that each begins with.
        seeds: the first chooses.
        steps: length of the longest training; None: three epochs, or what `seconds` leave.
        seconds: about how long all of it may take.
        metric: what the score is.
        sizes: (images of a training batch, validation images).
        data: a text that differs where the data do.
        functions: names of the user's functions, which decide too.
        most_steps: no training is longer than this where `seconds` decide.
        extend: whether grids grow.
        folder: where finished trainings are kept.
        progress: show a table as it fills.
        say: takes a sentence about what will be done.
        speed: how long things take, where that is known already.

    Raises:
        FinetuneBNError: `seconds` are too few (OverBudget), or `folder` holds another comparison.
    """
    seeds = _checked_seeds(seeds)
    if steps is not None and seconds is not None:
        raise FinetuneBNError(complaint("seconds", seconds, "steps or seconds, not both"))
    if steps is not None:
        steps = number("steps", steps, least=1, whole=True)
    if seconds is not None:
        seconds = number("seconds", seconds, above=0, below=math.inf)
    identity = {
        "model": type(bench.model).__name__,
        "weights": fingerprint_of(bench.model),
        "data": data,
        "functions": list(functions),
        "part": bench.part,
        "step": [bench.accumulate, bench.clip],
        "arms": {name: arm.to_dict() for name, arm in arms.items()},
        "rates": {name: list(map(float, values)) for name, values in rates.items()},
        "seeds": list(seeds),
        "steps": steps,
        "seconds": seconds,
        "metric": metric,
        "extend": extend,
    }
    store = Store(folder, identity)
    started = time.perf_counter()
    pairs = sum(map(len, rates.values()))
    if "steps" in store.chosen:
        steps = int(store.chosen["steps"])
    elif steps is None and seconds is None:
        steps = 3 * count(bench.train.batches, MOST_STEPS)
    elif steps is None:
        assert seconds is not None
        arm = next(iter(arms.values()))
        states = RandomStates(*([bench.device] if bench.device.type == "cuda" else []))
        try:
            speed = speed or measure_speed(bench, arm, next(iter(rates.values()))[0], seeds[0])
        finally:
            states.restore()
        steps = steps_within(seconds, speed, pairs, len(seeds), most_steps)
    assert steps is not None
    store.choose(steps=steps)
    lengths = lengths_up_to(steps)
    say(f"compare: {in_words(speed, len(arms), max(map(len, rates.values())), len(seeds), steps)}")
    title = f"{type(bench.model).__name__}, up to {steps} steps"
    total = trainings_in_all(pairs, len(seeds), steps)
    with contextlib.ExitStack() as stack:
        told = stack.enter_context(live_table(title, metric, list(arms), total, progress))

        def run(trial: Trial) -> Outcome:
            known = store.find(trial)
            outcome = known or fine_tune(bench, arms[trial.arm], trial)
            if known is None:
                store.add(trial, outcome)
            told(trial, outcome, known is not None)
            result = outcome.failed or f"{metric} {outcome.score:.4g}"
            log.info(
                "compare: %s at lr %g, seed %d, %d steps: %s", trial.arm, trial.lr, trial.seed, trial.steps, result
            )
            return outcome

        search = Search(rates, seeds, lengths, run, extend)
        search.go()
    result = Comparison(
        type(bench.model).__name__,
        metric,
        {name: arm.what for name, arm in arms.items()},
        search.runs(),
        tuple(seeds),
        lengths,
        (sizes[0] * steps, sizes[1]),
        tuple(search.notes),
        time.perf_counter() - started,
    )
    result = _with_notes(result)
    if folder is not None:
        result.save(folder)
    return result


def _checked_seeds(seeds: Sequence[int]) -> list[int]:
    if isinstance(seeds, (str, int)) or not len(list(seeds)):
        raise FinetuneBNError(complaint("seeds", seeds, "one or more whole numbers"))
    checked = [number("seeds", seed, least=0, whole=True) for seed in seeds]
    if len(set(checked)) < len(checked):
        raise FinetuneBNError(complaint("seeds", list(seeds), "each seed once"))
    return checked


def _with_notes(result: Comparison) -> Comparison:
    """Add how sure the first place is, as far as the number of validation images tells."""
    rows = [row for row in result.table if row.score is not None and row.steps == max(result.lengths)]
    notes = list(result.notes)
    failed = [row.arm for row in result.table if row.score is None]
    if failed:
        notes.append(f"not trained: {', '.join(failed)}")
    n = result.images[1]
    if result.metric in ("accuracy", "val_accuracy") and len(rows) > 1 and n:
        first, second = rows[0].score or 0.0, rows[1].score or 0.0
        error = math.sqrt(max(first * (1 - first), 1e-9) / n)
        word = "within" if first - second <= 2 * error else "more than"
        notes.append(
            f"{rows[0].arm} is {100 * (first - second):.1f} points ahead of {rows[1].arm}, {word} two standard errors "
            f"({200 * error:.1f} points) of {n} validation images" + (": either will do" if word == "within" else "")
        )
    return dataclasses.replace(result, notes=tuple(notes))
