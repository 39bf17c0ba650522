"""How long a comparison may take: a number of steps, of seconds, or one of three words; and what fits in it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from finetune_bn.comparison.arms import ARMS, Arm
from finetune_bn.comparison.search import SHORTEST, lengths_up_to, steps_in_all, trainings_in_all
from finetune_bn.comparison.training import Trial, Workbench, copied, fine_tune, train
from finetune_bn.errors import FinetuneBNError, complaint

GROWTH = 1.25  # grids that grow, and treatments that are slower than the one that was timed
TIMED_STEPS = 4


@dataclass(frozen=True)
class Budget:
    """What one of the words stands for.

    Attributes:
        minutes: about how long the comparison takes.
        most: how many treatments are compared, the likely ones first.
        factors: the learning rates, as multiples of the one that is configured.
        seeds: how many seeds the last round has.
    """

    minutes: float
    most: int
    factors: tuple[float, ...]
    seeds: int


# One seed does not tell more than a few treatments apart: in scripts/study_advice.py two that were compared lost least.
BUDGETS = {
    "fast": Budget(2, 2, (1.0, 3.0), 1),
    "good": Budget(8, 5, (1 / 3, 1.0, 3.0), 1),
    "best": Budget(30, len(ARMS), (1 / 3, 1.0, 3.0), 2),
}
IN_WORDS = ", ".join(f"{name}: about {budget.minutes:g} minutes" for name, budget in BUDGETS.items())


@dataclass(frozen=True)
class Speed:
    """How long things take here, in seconds.

    Attributes:
        step: one step of a training.
        rest: the rest of a training: copy, conversion, evaluation.
    """

    step: float
    rest: float


class OverBudget(FinetuneBNError):
    """Not even the shortest trainings fit in the seconds that there are.

    Attributes:
        speed: how long things take.
    """

    def __init__(self, message: str, speed: Speed) -> None:
        super().__init__(message)
        self.speed = speed


def measure_speed(bench: Workbench, arm: Arm, lr: float, seed: int) -> Speed:
    """Time a few steps, and a training of one step with its evaluation, whose results are thrown away."""
    model = copied(bench.model).to(bench.device)
    optimizer, schedule = bench.optimizer(model, lr, SHORTEST)
    arms = Arm("timed", arm.policy, "")
    with torch.random.fork_rng(devices=[]):
        train(bench, arms, Trial("timed", lr, seed, 1), model, optimizer, schedule, [])  # allocations, kernels
        started = time.perf_counter()
        train(bench, arms, Trial("timed", lr, seed, TIMED_STEPS), model, optimizer, schedule, [])
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        step = (time.perf_counter() - started) / TIMED_STEPS
    # Twice, as the first imports and allocates what all others use.
    whole = min(fine_tune(bench, arm, Trial(arm.name, lr, seed, 1)).seconds for _ in range(2))
    return Speed(step, max(whole - step, 0.0))


def steps_within(seconds: float, speed: Speed, pairs: int, seeds: int, most: int) -> int:
    """Return how long the longest training of a comparison may be, for all of it to take about so many seconds.

    Args:
        seconds: the budget.
        speed: how long things take.
        pairs: treatments times learning rates.
        seeds: seeds in the last round.
        most: no training is longer than this.

    Raises:
        OverBudget: not even the shortest trainings fit.
    """

    def needed(steps: int) -> float:
        work = steps_in_all(pairs, seeds, steps) * speed.step + trainings_in_all(pairs, seeds, steps) * speed.rest
        return GROWTH * work

    lengths = range(min(SHORTEST, most), most + 1)
    fitting = [steps for steps in lengths if needed(steps) <= seconds]
    if not fitting:
        least = min(lengths, key=needed)
        allowed = (
            f"at least {math.ceil(needed(least))}, for {pairs} trainings of {least} steps, {speed.step:.2f} s each"
        )
        rest = f" and {speed.rest:.1f} s beside" if speed.rest >= 0.05 else ""
        remedy = "Or a larger budget, fewer arms, rates or validation images, or another device."
        raise OverBudget(complaint("seconds", seconds, allowed + rest, remedy), speed)
    return fitting[-1]


def in_words(speed: Speed | None, arms: int, rates: int, seeds: int, steps: int) -> str:
    """Return what will be done, and how long it takes as far as that is known."""
    lengths = " and ".join(", ".join(map(str, lengths_up_to(steps))).rsplit(", ", 1))
    text = f"{arms} treatments x {rates} learning rates, trainings of {lengths} steps"
    if speed is None:
        return text
    seconds = steps_in_all(arms * rates, seeds, steps) * speed.step
    seconds += trainings_in_all(arms * rates, seeds, steps) * speed.rest
    return f"{text}; a step takes {speed.step:.2g} s here, all of it about {duration(GROWTH * seconds)}"


def duration(seconds: float) -> str:
    """Return seconds in words."""
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
