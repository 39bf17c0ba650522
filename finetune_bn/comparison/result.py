"""What a comparison has found: one run a treatment, learning rate and seed, and the table of the treatments."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from finetune_bn.diagnosis.comparison_page import comparison_page
from finetune_bn.utilities.files import write_atomically
from finetune_bn.utilities.layer_figure import COLORS
from finetune_bn.utilities.rendering import FAINT, FONT, INK, fonts, new_figure
from finetune_bn.utilities.results import Result, Shown

FORM = "finetune_bn.comparison/1"
_MARKERS = "os^DvPX*"


@dataclass(frozen=True)
class Run:
    """One treatment at one learning rate with one seed, over all the lengths that it was trained for.

    Attributes:
        arm: name of the treatment.
        lr: peak learning rate.
        seed: decides the order of the images, dropout and augmentation.
        steps: length of its longest training.
        curve: (length of a training, score behind it), each training from the start; None where it failed.
        losses: (step, mean training loss since the one before) of the longest training.
        score: of the longest training, higher is better; None where it failed.
        seconds: of all its trainings.
        dropped_at: number of steps after which it was dropped, as others were better; None: it got to the end.
        failed: why the longest training failed; None: it did not.
    """

    arm: str
    lr: float
    seed: int
    steps: int
    curve: tuple[tuple[int, float | None], ...]
    losses: tuple[tuple[int, float], ...]
    score: float | None
    seconds: float
    dropped_at: int | None = None
    failed: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the run as plain data."""
        return asdict(self) | {"curve": [list(p) for p in self.curve], "losses": [list(p) for p in self.losses]}


@dataclass(frozen=True)
class ArmResult:
    """One treatment at its best learning rate.

    Attributes:
        arm: its name.
        what: the treatment in words.
        lr: its best learning rate; None where all failed.
        score: mean over the seeds, at that rate and its longest training.
        sd: standard deviation over the seeds; None with one.
        steps: length of that training.
        seeds: how many seeds the score is of.
        seconds: of one such training.
        dropped_at: where all its rates were dropped: the steps of the last that was; None: one got to the end.
        failed: why it has no score.
    """

    arm: str
    what: str
    lr: float | None
    score: float | None
    sd: float | None
    steps: int
    seeds: int
    seconds: float
    dropped_at: int | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Comparison(Result):
    """What `compare` found; `print` it for a table.

    Attributes:
        model: class name of the model.
        metric: what the score is, higher is better.
        arms: the treatments, and what each is, in words.
        runs: one a treatment, learning rate and seed.
        seeds: the seeds; the first chose the learning rates, all of them are in the scores of the longest trainings.
        lengths: numbers of steps of the trainings, shortest first.
        images: (training images seen in the longest training, validation images).
        notes: what is to be known of the result, a sentence each.
        seconds: how long all of it took.
    """

    model: str
    metric: str
    arms: dict[str, str]
    runs: tuple[Run, ...]
    seeds: tuple[int, ...]
    lengths: tuple[int, ...]
    images: tuple[int, int]
    notes: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def table(self) -> tuple[ArmResult, ...]:
        """One row a treatment, best first: those that got furthest, and among them by their score."""
        rows = [self._row(arm) for arm in self.arms]
        return tuple(sorted(rows, key=lambda row: (row.score is None, -row.steps, -(row.score or 0.0))))

    @property
    def best(self) -> ArmResult | None:
        """The treatment with the best score among those that got to the end; None where all failed."""
        first = self.table[0]
        return None if first.score is None else first

    def runs_of(self, arm: str) -> list[Run]:
        """Return the runs of a treatment, by learning rate and seed."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: (run.lr, run.seed))

    def _row(self, arm: str) -> ArmResult:
        runs = self.runs_of(arm)
        scored = [run for run in runs if run.score is not None]
        if not scored:
            why = next((run.failed for run in runs if run.failed), "it was not run")
            longest = max((run.steps for run in runs), default=0)
            seconds = sum(run.seconds for run in runs)
            return ArmResult(arm, self.arms[arm], None, None, None, longest, 0, seconds, failed=why)
        steps = max(run.steps for run in scored)
        by_rate: dict[float, list[Run]] = {}
        for run in scored:
            if run.steps == steps:
                by_rate.setdefault(run.lr, []).append(run)
        # A rate of which a seed failed is no rate to recommend while there is another.
        full = max(len(group) for group in by_rate.values())
        lr, group = max(
            ((lr, group) for lr, group in by_rate.items() if len(group) == full),
            key=lambda item: (fmean(_scores(item[1])), -item[0]),
        )
        scores = _scores(group)
        dropped = None if steps == max(self.lengths) else max((run.dropped_at or 0 for run in group), default=0) or None
        return ArmResult(
            arm,
            self.arms[arm],
            lr,
            fmean(scores),
            stdev(scores) if len(scores) > 1 else None,
            steps,
            len(scores),
            fmean(run.seconds for run in group),
            dropped,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data; `SCHEMA` of `finetune_bn.comparison.schema` describes it."""
        return {
            "form": FORM,
            "model": self.model,
            "metric": self.metric,
            "arms": dict(self.arms),
            "seeds": list(self.seeds),
            "lengths": list(self.lengths),
            "images": {"train": self.images[0], "val": self.images[1]},
            "best": None if self.best is None else self.best.arm,
            "table": [asdict(row) for row in self.table],
            "runs": [run.to_dict() for run in self.runs],
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def to_csv(self) -> str:
        """Return the runs as CSV text, one a line."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        columns = ["arm", "lr", "seed", "steps", "score", "seconds", "dropped_at", "failed"]
        writer.writerow(columns)
        for run in self.runs:
            values = [getattr(run, name) for name in columns]
            writer.writerow(["" if value is None else value for value in values])
        return text.getvalue()

    def save(self, folder: str | Path) -> None:
        """Write comparison.json, comparison.csv and the page comparison.html into a folder, which is made."""
        write_atomically(Path(folder) / "comparison.json", self.to_json())
        write_atomically(Path(folder) / "comparison.csv", self.to_csv())
        self.save_html(Path(folder) / "comparison.html")

    def save_html(self, path: str | Path) -> None:
        """Write one page that opens from disk and asks for nothing else: treatments, how they learned, all runs.

        Args:
            path: the file.

        Raises:
            OSError: it cannot be written.
        """
        write_atomically(path, comparison_page(self.to_dict()))

    def shown(self) -> Shown:
        """Return which treatment was best, and a row a treatment."""
        best = self.best
        title = (
            f"{self.model}: none of {len(self.arms)} treatments could be trained"
            if best is None
            else f"{self.model}: {best.arm} ({best.what}) at lr {best.lr:g} is best of {len(self.arms)} treatments, "
            f"{self.metric} {_number(best.score)}"
        )
        header = ("arm", "lr", self.metric, "sd", "seeds", "steps", "seconds", "what became of it")
        rows = [
            (
                row.arm,
                "" if row.lr is None else f"{row.lr:g}",
                _number(row.score),
                "" if row.sd is None else _number(row.sd),
                str(row.seeds),
                str(row.steps),
                f"{row.seconds:.1f}",
                self._fate(row),
            )
            for row in self.table
        ]
        return Shown(title, header, rows, self.notes, right=range(1, 7))

    def _fate(self, row: ArmResult) -> str:
        if row.failed is not None:
            return f"failed: {row.failed}"
        failed = sorted({run.lr for run in self.runs_of(row.arm) if run.failed})
        beside = f"; failed at lr {', '.join(f'{lr:g}' for lr in failed)}" if failed else ""
        if row.dropped_at is not None:
            return f"dropped at {row.dropped_at} steps{beside}"
        return f"to the end{beside}"

    def plot(self) -> Any:
        """Return a matplotlib figure: the score of each treatment by learning rate, at its longest training.

        Rates that were dropped are drawn at the score that they had by then, in hollow markers.

        Raises:
            MissingDependency: matplotlib is not installed.
        """
        figure = new_figure(8.4, 4.8)
        with fonts():
            axes = figure.subplots()
            for i, arm in enumerate(self.arms):
                points = _by_rate(run for run in self.runs_of(arm) if run.score is not None)
                if not points:
                    continue
                color, marker = COLORS[i % len(COLORS)], _MARKERS[i % len(_MARKERS)]
                rates = [lr for lr, _, _ in points]
                line = "-" if i < len(COLORS) else "--"
                axes.plot(rates, [s for _, s, _ in points], color=color, linestyle=line, linewidth=1.4, label=arm)
                for lr, score, steps in points:
                    inside = color if steps == max(self.lengths) else "white"
                    axes.plot([lr], [score], marker=marker, color=color, markerfacecolor=inside, markersize=7)
            axes.set_xscale("log")
            axes.set_title(
                f"{self.model}, up to {max(self.lengths, default=0)} steps (hollow: dropped before)",
                loc="left",
                fontsize=1.1 * FONT,
                color=INK,
                fontweight="bold",
                parse_math=False,
            )
            axes.set_xlabel("learning rate", fontsize=FONT, color=INK)
            axes.set_ylabel(self.metric, fontsize=FONT, color=INK, parse_math=False)
            axes.grid(color=FAINT, linewidth=0.7)
            axes.set_axisbelow(True)
            axes.tick_params(labelcolor=INK, length=0)
            for side, spine in axes.spines.items():
                spine.set(visible=side in ("left", "bottom"), color=FAINT)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=0.85 * FONT, labelcolor=INK)
        return figure


def _by_rate(runs: Iterable[Run]) -> list[tuple[float, float, int]]:
    """Return (rate, mean score, steps) of the longest trainings at each rate."""
    groups: dict[float, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.lr, []).append(run)
    found = []
    for lr, group in sorted(groups.items()):
        steps = max(run.steps for run in group)
        found.append((lr, fmean(_scores([run for run in group if run.steps == steps])), steps))
    return found


def _scores(runs: Iterable[Run]) -> list[float]:
    return [run.score for run in runs if run.score is not None]


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.4g}"
