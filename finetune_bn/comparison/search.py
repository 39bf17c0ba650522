"""Which trainings a comparison makes: grids of learning rates that grow at their edge, and successive halving.

Successive halving (Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter
optimization"; the inner loop of Hyperband, Li et al. 2018): all pairs of treatment and learning rate get a short
training, the best third a training three times as long, and so on. Each training starts anew and runs its schedule to
the end, so that a score is never that of a learning rate in the midst of its way down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from finetune_bn.comparison.result import Run
from finetune_bn.comparison.training import Outcome, Trial

ETA = 3  # of so many pairs one goes on; so many times as long is the next training
SHORTEST = 20  # steps; in fewer no head is found
MOST_EXTENSIONS = 3  # rates that are added to the grid of a treatment

Pair = tuple[str, float]


def lengths_up_to(steps: int, shortest: int = SHORTEST) -> tuple[int, ...]:
    """Return the numbers of steps of the rounds, shortest first: each a third of the next, down to `shortest`."""
    found = [steps]
    while found[0] // ETA >= shortest:
        found.insert(0, found[0] // ETA)
    return tuple(found)


def pairs_by_round(pairs: int, rounds: int) -> list[int]:
    """Return how many pairs of treatment and rate are trained in each round, without those that a grid grows by."""
    counts = [pairs]
    for _ in range(rounds - 1):
        counts.append(survivors(counts[-1]))
    return counts


def survivors(pairs: int) -> int:
    """Return how many of so many pairs go on."""
    return max(1, math.ceil(pairs / ETA))


def steps_in_all(pairs: int, seeds: int, steps: int) -> int:
    """Return the steps of a whole comparison whose longest training has so many, without growing grids."""
    lengths = lengths_up_to(steps)
    counts = pairs_by_round(pairs, len(lengths))
    counts[-1] *= seeds
    return sum(n * length for n, length in zip(counts, lengths, strict=True))


def trainings_in_all(pairs: int, seeds: int, steps: int) -> int:
    """Return the number of trainings of a whole comparison, without growing grids."""
    counts = pairs_by_round(pairs, len(lengths_up_to(steps)))
    return sum(counts[:-1]) + counts[-1] * seeds


@dataclass
class Search:
    """Runs the trainings and keeps what came of them.

    Attributes:
        rates: the learning rates that each treatment starts with.
        seeds: the first chooses; all are in the last round.
        lengths: steps of the rounds.
        run: returns the outcome of a training, from a store where it is known.
        extend: whether grids grow where the best rate is at their edge.
        dropped: pairs and the steps at which they were dropped.
        outcomes: by training.
    """

    rates: Mapping[str, Sequence[float]]
    seeds: Sequence[int]
    lengths: Sequence[int]
    run: Callable[[Trial], Outcome]
    extend: bool = True
    dropped: dict[Pair, int] = field(default_factory=dict)
    outcomes: dict[Trial, Outcome] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def go(self) -> None:
        """Make all trainings."""
        self.tried = {arm: sorted(rates) for arm, rates in self.rates.items()}
        pairs = [(arm, lr) for arm, rates in self.tried.items() for lr in rates]
        for steps in self.lengths:
            for pair in pairs:
                self._train(pair, steps)
            if self.extend:
                for arm in dict.fromkeys(arm for arm, _ in pairs):
                    pairs += self._extended(arm, pairs, steps)
            alive = [pair for pair in pairs if self._score(pair, steps) is not None]
            if steps == self.lengths[-1] or not alive:
                break
            alive.sort(key=lambda pair: self._rank(pair, steps))
            kept = alive[: survivors(len(pairs))]
            self.dropped |= {pair: steps for pair in alive if pair not in kept}
            pairs = [pair for pair in pairs if pair in kept]

    def runs(self) -> tuple[Run, ...]:
        """Return what was trained as runs, in the order of treatments, rates and seeds."""
        groups: dict[tuple[str, float, int], list[Trial]] = {}
        for trial in self.outcomes:
            groups.setdefault((trial.arm, trial.lr, trial.seed), []).append(trial)
        order = {arm: i for i, arm in enumerate(self.tried)}
        found = []
        for (arm, lr, seed), trials in sorted(groups.items(), key=lambda item: (order[item[0][0]], *item[0][1:])):
            trials.sort(key=lambda trial: trial.steps)
            outcomes = [self.outcomes[trial] for trial in trials]
            last = outcomes[-1]
            curve = tuple((t.steps, o.score) for t, o in zip(trials, outcomes, strict=True))
            seconds = sum(outcome.seconds for outcome in outcomes)
            dropped = self.dropped.get((arm, lr))
            found.append(
                Run(arm, lr, seed, trials[-1].steps, curve, last.losses, last.score, seconds, dropped, last.failed)
            )
        return tuple(found)

    def _seeds(self, steps: int) -> Sequence[int]:
        return self.seeds if steps == self.lengths[-1] else self.seeds[:1]

    def _train(self, pair: Pair, steps: int) -> None:
        for seed in self._seeds(steps):
            trial = Trial(*pair, seed, steps)
            self.outcomes[trial] = self.run(trial)

    def _score(self, pair: Pair, steps: int) -> float | None:
        """Return the mean score of a pair; None where a seed of it failed."""
        scores = [self.outcomes[Trial(*pair, seed, steps)].score for seed in self._seeds(steps)]
        return None if any(score is None for score in scores) else fmean(s for s in scores if s is not None)

    def _rank(self, pair: Pair, steps: int) -> tuple[float, float]:
        """Return what sorts the better of two pairs first: the score, and the training loss where it is the same."""
        score = self._score(pair, steps)
        losses = [self.outcomes[Trial(*pair, seed, steps)].losses for seed in self._seeds(steps)]
        return -(score if score is not None else -math.inf), fmean(loss[-1][1] for loss in losses)

    def _extended(self, arm: str, pairs: list[Pair], steps: int) -> list[Pair]:
        """Add rates to a treatment's grid, and train them, while its best one is at the edge of all that were tried."""
        added: list[Pair] = []
        while True:
            here = [pair for pair in (*pairs, *added) if pair[0] == arm and self._score(pair, steps) is not None]
            if not here:
                return added
            best = max(here, key=lambda pair: (self._score(pair, steps) or 0.0, -pair[1]))[1]
            tried = self.tried[arm]
            others = [self._score(pair, steps) or 0.0 for pair in here if pair[1] != best]
            equal = bool(others) and (self._score((arm, best), steps) or 0.0) <= max(others)
            if len(tried) < 2 or best not in (tried[0], tried[-1]) or equal:
                return added
            side = "smallest" if best == tried[0] else "largest"
            if len(tried) >= len(self.rates[arm]) + MOST_EXTENSIONS:
                note = f"{arm}: its best learning rate, {best:g}, is the {side} that was tried"
                self.notes += [note] if note not in self.notes else []
                return added
            ratio = tried[1] / tried[0] if best == tried[0] else tried[-1] / tried[-2]
            new = _rounded(best / ratio if best == tried[0] else best * ratio)
            self.tried[arm] = sorted([*tried, new])
            self._train((arm, new), steps)
            added.append((arm, new))


def _rounded(lr: float) -> float:
    return float(f"{lr:.3g}")
