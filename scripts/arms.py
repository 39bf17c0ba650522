"""Arms in settings of scripts/compact.py: which cells a study lacks, what an arm reached, which of two is ahead.

A study is a list of `Arm`, in the order of importance. Cells that another study has are not measured again: a run takes
their rows into the file of its own, so that tables follow from that file alone. `live` and `recalibrated` are one
training, evaluated twice.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import cells
import torch
from compact import CHOOSE, FIRST_RUNGS, LADDER, Setting, missing
from store import Store

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
Rows = Sequence[Row]


def trained_as(arm: str) -> str:
    """Return the arm whose training this one is."""
    return "live" if arm == "recalibrated" else arm


def of_arm(rows: Rows, setting: str, arm: str, part: str) -> dict[tuple[float, int], float]:
    """Return an arm's figure of validation or test images by learning rate and seed."""
    score = f"{part}/recalibrated" if arm == "recalibrated" else part
    mine = (row for row in rows if (row["setting"], row["arm"]) == (setting, trained_as(arm)))
    return {(row["lr"], row["seed"]): row[score] for row in mine}


def tried(rows: Rows, setting: str, arm: str) -> dict[float, float]:
    """Return the validation figure of the choosing seed by learning rate."""
    return {lr: value for (lr, seed), value in of_arm(rows, setting, arm, "val").items() if seed == CHOOSE}


@dataclass(frozen=True)
class Arm:
    """An arm of one setting.

    Attributes:
        setting: where it is trained.
        arm: its name in rows.
        seeds: that report.
        after: the same arm in a setting whose learning rate this search starts from; None: from `first`.
        ladder: learning rates, ascending.
        first: rates that the search starts with.
    """

    setting: Setting
    arm: str
    seeds: tuple[int, ...] = (0, 1, 2)
    after: Setting | None = None
    ladder: tuple[float, ...] = LADDER
    first: tuple[float, ...] = FIRST_RUNGS

    def starts(self, rows: Rows) -> tuple[float, ...]:
        """Return the rates that the search starts with; none where that is not known yet."""
        if self.after is None:
            return self.first
        lr = Arm(self.after, self.arm).rate(rows)
        return () if lr is None else (lr,)

    def rate(self, rows: Rows) -> float | None:
        """Return the learning rate once its search is over."""
        starts = self.starts(rows)
        return cells.chosen_rate(tried(rows, self.setting.name, self.arm), self.ladder, starts) if starts else None

    def validation(self, rows: Rows) -> float:
        """Return the best figure of the choosing seed's validation images."""
        return max(tried(rows, self.setting.name, self.arm).values())

    def wanted(self, rows: Rows) -> Iterator[Row]:
        """Yield the cells that can be measured now, those that are there among them."""
        if starts := self.starts(rows):
            for lr in cells.rates_to_try(tried(rows, self.setting.name, self.arm), self.ladder, starts):
                yield self._cell(lr, CHOOSE)
            if (lr := self.rate(rows)) is not None:
                yield from (self._cell(lr, seed) for seed in self.seeds)

    def reached(self, rows: Rows) -> dict[int, float]:
        """Return the test figure by seed, at the learning rate that was chosen."""
        lr, found = self.rate(rows), of_arm(rows, self.setting.name, self.arm, "test")
        return {seed: found[lr, seed] for seed in self.seeds if lr is not None and (lr, seed) in found}

    def _cell(self, lr: float, seed: int) -> Row:
        return {"setting": self.setting.name, "arm": trained_as(self.arm), "lr": lr, "seed": seed}


def common(rows: Rows, plan: Sequence[Arm], setting: Setting) -> set[int]:
    """Return the seeds that all arms of a setting have which have two or more: a table compares these alone."""
    found = [set(reached) for arm in plan if arm.setting == setting and len(reached := arm.reached(rows)) > 1]
    return set.intersection(*found) if found else set()


def line(rows: Rows, arm: Arm, among: set[int] | None = None) -> Row | None:
    """Return what an arm reached with these seeds, or all, for a table; None with less than two."""
    values = [value for seed, value in arm.reached(rows).items() if among is None or seed in among]
    if len(values) < 2:
        return None
    lr = arm.rate(rows)
    told = {"family": arm.setting.family, "batch": arm.setting.batch, "arm": arm.arm, "steps": arm.setting.steps}
    told |= {"lr": lr, "at_the_edge": lr in (arm.ladder[0], arm.ladder[-1]), "seeds": len(values)}
    return told | {"test": fmean(values), "sd": stdev(values)}


def against(rows: Rows, arm: Arm, other: Arm, among: set[int] | None = None) -> Row | None:
    """Return by how much an arm is ahead of another one, seed by seed, of these or all; None with less than two."""
    mine, theirs = arm.reached(rows), other.reached(rows)
    seeds = sorted(seed for seed in mine.keys() & theirs.keys() if among is None or seed in among)
    if len(seeds) < 2:
        return None
    return {
        "family": arm.setting.family,
        "batch": arm.setting.batch,
        "arm": arm.arm,
        "other": other.arm,
        "seeds": len(seeds),
        "before": fmean(theirs[seed] for seed in seeds),
        "after": fmean(mine[seed] for seed in seeds),
    } | cells.gain([mine[seed] - theirs[seed] for seed in seeds])


def preferred(rows: Rows, rivals: Sequence[Arm]) -> Arm | None:
    """Return the arm that validation images of the choosing seed prefer, once all of them were searched."""
    if any(arm.rate(rows) is None for arm in rivals):
        return None
    return max(rivals, key=lambda arm: arm.validation(rows))


def difference(one: Row) -> str:
    """Return a difference with its interval: bold where there is one, else with the reason for which it is none."""
    told = f"{one['points']:+.1f} ({one['low']:+.1f} to {one['high']:+.1f})"
    return f"**{told}**" if one["decided"] else told + cells.why_undecided(one["seeds"])


def table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)


def commits(rows: Rows) -> Row:
    """Return how many rows were measured by which commit; `before` are those of the time when none was stored."""
    return dict(Counter(row.get("commit", "before") for row in rows))


def shared(sources: Sequence[Path], plan: Sequence[Arm]) -> list[Row]:
    """Return the rows of other studies that are cells of these arms."""
    found = [Store(path, "", device="cpu").rows for path in sources if path.exists()]
    names = {(arm.setting.name, trained_as(arm.arm)) for arm in plan}
    return [row for rows in found for row in rows if (row["setting"], row["arm"]) in names]


def key_of(row: Row) -> tuple[Any, ...]:
    """Return what a row is a row of."""
    return row["setting"], row["arm"], row["lr"], row["seed"]


def adopt(store: Store, rows: Rows) -> None:
    """Take rows of other studies into a study's own, where it has none of the same cell."""
    done = {key_of(row) for row in store.rows}
    for row in rows:
        if key_of(row) not in done:
            done.add(key_of(row))
            store.rows.append(row)


def next_cells(plan: Sequence[Arm], sources: Sequence[Path], store: Store) -> Iterator[Row]:
    """Yield the cells that can be measured now, most important first; more appear as results come in."""
    adopt(store, shared(sources, plan))
    done = {key_of(row) for row in store.rows}
    for arm in plan:
        if missing(arm.setting) is None:
            yield from (cell for cell in arm.wanted(store.rows) if key_of(cell) not in done)


def run(
    name: str,
    doc: str | None,
    plan: Sequence[Arm],
    sources: Sequence[str],
    measure: Callable[..., Row],
    write: Callable[[Rows, Path], Row],
) -> None:
    """Run a study from the command line.

    Args:
        name: of its script and its results.
        doc: what `--help` says.
        plan: its arms, most important first.
        sources: names of the results files in which other studies have some of its cells.
        measure: trains one cell.
        write: writes tables and plots from rows to files that begin with a path, and returns the summary.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--only", nargs="+", default=[], help="words, one of which is in the name of a setting to run")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    parser.add_argument(
        "--shared", type=Path, help="folder of the rows of other studies (default: that of the results)"
    )
    parser.add_argument("--report-only", action="store_true", help="write tables and plots from the rows there are")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = sorted({CHOOSE, *(seed for arm in plan for seed in arm.seeds)})
    store = Store(args.out / f"{name}.json", f"python scripts/{name}.py", seeds, "cpu")
    others = [(args.shared or args.out) / source for source in sources]
    if not args.report_only:
        chosen = [arm for arm in plan if not args.only or any(word in arm.setting.name for word in args.only)]
        cells.run(store, partial(next_cells, chosen, others), measure, args.workers, "val")
    adopt(store, shared(others, plan))
    store.finish(write(store.rows, store.path.with_suffix("")) | {"commits": commits(store.rows)})
