"""Tables and plots of study_shift.py from its rows: results/study_shift*.md and study_shift_*.png."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from corruptions import SEVERITIES, STRENGTHS
from store import Store, write_atomically

# A shift is (name, severity); the other vendors, and no shift at all, have no severity.
OTHERS = ("twemoji", "fluent")
MAIN = (("none", 0), *((vendor, 0) for vendor in OTHERS), *((kind, 5) for kind in STRENGTHS))
MIXTURES = {"vendors": MAIN[:3], "corruptions": (MAIN[0], *MAIN[3:])}
GROUPS = {"none": MAIN[:1], "the other vendors": MAIN[1:3], "corruptions, severity 5": MAIN[3:]}
# Images in a test batch, images to recalibrate on, what the source's statistics are worth, labeled images.
TEST_BATCHES, SIZES, PRIORS, LABELS = (8, 32, 128), (8, 32, 128, 512, 1024), (0, 16, 128), (32, 128)
USUAL_SIZE, MIXED_IMAGES = 512, 1024

Rows = list[dict[str, Any]]
Shift = tuple[str, int]
PREFIX = "study_shift"


class Spread:
    """Mean and standard deviation over seeds; prints as `73.6 ± 1.0`."""

    def __init__(self, values: Sequence[float]) -> None:
        self.seeds = len(values)
        self.mean = fmean(values) if values else None
        self.sd = stdev(values) if len(values) > 1 else None

    def text(self, form: str = ".1f") -> str:
        if self.mean is None:
            return "-"
        # -0.04 is printed as 0.0, not as -0.0.
        mean = format(self.mean, form.replace(".", "z."))
        return mean if self.sd is None else f"{mean} ± {format(self.sd, form.lstrip('+'))}"

    def data(self) -> dict[str, Any]:
        return {"mean": self.mean, "sd": self.sd, "seeds": self.seeds}


class Results:
    """The rows by key, averaged over seeds, gains taken seed by seed."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.seeds = sorted({row["seed"] for row in rows})

    def value(self, seed: int, figure: str = "accuracy", **key: Any) -> float | None:
        wanted = (key | {"seed": seed}).items()
        found = [row for row in self.rows if all(row.get(k) == v for k, v in wanted)]
        return found[-1].get(figure) if found else None

    def spread(self, figure: Callable[[int], float | None]) -> Spread:
        values = [figure(seed) for seed in self.seeds]
        return Spread([value for value in values if value is not None])

    def under(self, shift: Shift, figure: str = "accuracy", **key: Any) -> Spread:
        return self.spread(lambda seed: self.value(seed, figure, part="shift", **at(shift), **key))

    def mean(self, seed: int, shifts: Sequence[Shift], **key: Any) -> float | None:
        """Return the mean accuracy over some shifts, None unless all of them were measured."""
        values = [self.value(seed, **at(shift), **key) for shift in shifts]
        known = [value for value in values if value is not None]
        return fmean(known) if len(known) == len(values) else None

    def above(self, shifts: Sequence[Shift], key: dict[str, Any], reference: dict[str, Any]) -> Spread:
        """Return points above what has the reference's key, seed by seed, as the mean over some shifts."""

        def of_seed(seed: int) -> float | None:
            these, those = self.mean(seed, shifts, **key), self.mean(seed, shifts, **reference)
            return None if these is None or those is None else these - those

        return self.spread(of_seed)

    def gain(self, shifts: Sequence[Shift], **key: Any) -> Spread:
        """Return points above the source's statistics."""
        return self.above(shifts, {"part": "shift", **key}, {"part": "shift", "arm": "source"})

    def tuned(self, shift: Shift, arm: str, labels: int) -> tuple[float | None, Spread]:
        """Return the learning rate that is best by validation images, over all seeds, and the test accuracy there."""
        key = {"part": "tuned", **at(shift), "arm": arm, "labels": labels}
        rates = {row["lr"] for row in self.rows if all(row.get(k) == v for k, v in key.items())}
        validation = {
            lr: self.spread(lambda seed, lr=lr: self.value(seed, "val_accuracy", **key, lr=lr)) for lr in sorted(rates)
        }
        if not validation:
            return None, Spread([])
        most = max(spread.seeds for spread in validation.values())
        best = max((lr for lr in validation if validation[lr].seeds == most), key=lambda lr: validation[lr].mean or 0)
        return best, self.spread(lambda seed: self.value(seed, **key, lr=best))


def at(shift: Shift) -> dict[str, Any]:
    return {"shift": shift[0], "severity": shift[1]}


def name(shift: Shift) -> str:
    return f"{shift[0]} {shift[1]}" if shift[1] else shift[0]


def table(head: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:], *(f"\n{note}" for note in notes)]) + "\n"


def shift_table(results: Results) -> str:
    head = ["shift", "moved by, sd", "source"]
    head += [f"batch of {n}" for n in TEST_BATCHES] + [f"recalibrated, n = {n}" for n in SIZES]
    lines = []
    for shift in MAIN:
        cells = [name(shift), results.under(shift, "moved_by", arm="source").text(".2f")]
        cells.append(results.under(shift, arm="source").text())
        cells += [results.under(shift, arm="batch", n=n).text() for n in TEST_BATCHES]
        cells += [results.under(shift, arm="recalibrated", n=n, prior=0).text() for n in SIZES]
        lines.append(cells)
    gains = [
        f"{group} {results.gain(shifts, arm='recalibrated', n=USUAL_SIZE, prior=0).text('+.1f')}"
        for group, shifts in GROUPS.items()
    ]
    unprepared = [
        f"{group} {results.gain(shifts, arm='unprepared', n=USUAL_SIZE).text('+.1f')}"
        for group, shifts in GROUPS.items()
    ]
    notes = [
        f"Points that {USUAL_SIZE} images buy: {'; '.join(gains)}.",
        f"The same without `how='preserve'` on the source before: {'; '.join(unprepared)}.",
    ]
    return table(head, lines, notes)


def prior_table(results: Results) -> str:
    lines = []
    for group, shifts in GROUPS.items():
        for prior in PRIORS:
            gains = [results.gain(shifts, arm="recalibrated", n=n, prior=prior).text("+.1f") for n in SIZES]
            lines.append([group, str(prior), *gains])
        gains = [results.gain(shifts, arm="batch", n=n).text("+.1f") if n in TEST_BATCHES else "" for n in SIZES]
        lines.append([group, "each test batch by itself", *gains])
    return table(["shift", "prior", *(f"n = {n}" for n in SIZES)], lines)


def severity_table(results: Results) -> str:
    lines = []
    for kind in STRENGTHS:
        for label, key in arms_by_severity().items():
            lines.append([kind, label, *(results.under((kind, s), **key).text() for s in SEVERITIES)])
    return table(["corruption", "statistics", *(f"severity {s}" for s in SEVERITIES)], lines)


def arms_by_severity() -> dict[str, dict[str, Any]]:
    return {
        "source": {"arm": "source"},
        "batch of 128": {"arm": "batch", "n": 128},
        f"recalibrated, n = {USUAL_SIZE}": {"arm": "recalibrated", "n": USUAL_SIZE, "prior": 0},
    }


def mixed_table(results: Results) -> str:
    arms = ("source", "batch", "pooled", "bank")
    lines, notes = [], []
    for mixture, domains in MIXTURES.items():
        common = {"part": "mixed", "mixture": mixture}
        for label, chosen in [*((name(d), [d]) for d in domains), ("**all**", domains)]:
            spreads = (
                results.spread(lambda seed, key=common | {"arm": arm}, c=chosen: results.mean(seed, c, **key))
                for arm in arms
            )
            lines.append([mixture, label, *(spread.text() for spread in spreads)])
        gains = [
            results.above(domains, common | {"arm": arm}, common | {"arm": "source"}).text("+.1f")
            for arm in ("pooled", "bank")
        ]
        notes.append(
            f"Points above the source's statistics, {mixture}: one recalibration {gains[0]}, a bank {gains[1]}."
        )
    return table(["mixture", "domain", "source", "mixed batches of 128", "one recalibration", "a bank"], lines, notes)


def tuned_table(results: Results) -> str:
    head = ["shift", "not tuned: source", "recalibrated"]
    for labels in LABELS:
        head += [f"{labels} labels: source", "recalibrated"]
    lines = []
    for shift in MAIN[1:]:
        cells = [results.under(shift, arm="source").text()]
        cells.append(results.under(shift, arm="recalibrated", n=USUAL_SIZE, prior=0).text())
        for labels in LABELS:
            for arm in ("source", "recalibrated"):
                rate, spread = results.tuned(shift, arm, labels)
                cells.append(spread.text() + (f" (at {rate:g})" if rate else ""))
        lines.append([name(shift), *cells])
    notes = []
    for labels in LABELS:

        def of_seed(seed: int, labels: int = labels) -> float | None:
            sides = [[], []]
            for side, arm in zip(sides, ("source", "recalibrated"), strict=True):
                for shift in MAIN[1:]:
                    rate, _ = results.tuned(shift, arm, labels)
                    key = {"part": "tuned", "arm": arm, "labels": labels, "lr": rate}
                    side.append(results.value(seed, **at(shift), **key))
            differences = [b - a for a, b in zip(*sides, strict=True) if a is not None and b is not None]
            return fmean(differences) if len(differences) == len(MAIN) - 1 else None

        gain = results.spread(of_seed)
        notes.append(f"Points that recalibration is ahead after {labels} labels, all shifts: {gain.text('+.1f')}.")
    return table(head, lines, notes)


def summarize(results: Results) -> dict[str, Any]:
    """Return the figures of the tables as data."""
    summary: dict[str, Any] = {"by_shift": {}, "gain": {}, "mixed": {}, "tuned": {}}
    for shift in MAIN:
        summary["by_shift"][name(shift)] = {
            "moved_by": results.under(shift, "moved_by", arm="source").data(),
            "source": results.under(shift, arm="source").data(),
            **{f"batch {n}": results.under(shift, arm="batch", n=n).data() for n in TEST_BATCHES},
            **{f"n {n}": results.under(shift, arm="recalibrated", n=n, prior=0).data() for n in SIZES},
            "gain": results.gain([shift], arm="recalibrated", n=USUAL_SIZE, prior=0).data(),
            "unprepared": results.under(shift, arm="unprepared").data(),
        }
    for group, shifts in GROUPS.items():
        summary["gain"][group] = {
            f"n {n}, prior {prior}": results.gain(shifts, arm="recalibrated", n=n, prior=prior).data()
            for n in SIZES
            for prior in PRIORS
        }
    for row in results.rows:
        if row["part"] == "mixed":
            key = {k: row[k] for k in ("part", "mixture", "shift", "severity", "arm")}
            label = f"{row['mixture']}: {name((row['shift'], row['severity']))}"
            spread = results.spread(lambda seed, key=key: results.value(seed, **key))
            summary["mixed"].setdefault(label, {})[row["arm"]] = spread.data()
    for shift in MAIN[1:]:
        for labels in LABELS:
            for arm in ("source", "recalibrated"):
                rate, spread = results.tuned(shift, arm, labels)
                summary["tuned"][f"{name(shift)}, {labels} labels, {arm}"] = {"lr": rate, **spread.data()}
    return summary


def plot_sizes(results: Results, path: Path) -> None:
    """Draw accuracy against the number of images, a panel a shift, a curve a prior."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(14, 6.4), sharex=True, layout="constrained")
    for axis, shift in zip(axes.flat, MAIN, strict=True):
        source = results.under(shift, arm="source").mean
        if source is not None:
            axis.axhline(source, color="black", linestyle="--", label="source statistics")
        for i, prior in enumerate(PRIORS):
            draw(
                axis,
                results,
                shift,
                "recalibrated",
                SIZES,
                f"recalibrated, prior {prior}",
                f"C{i}",
                1.04**i,
                prior=prior,
            )
        draw(axis, results, shift, "batch", TEST_BATCHES, "each test batch by itself", "C7", 1.04**3, linestyle=":")
        axis.set(xscale="log", title=name(shift) if shift[0] != "none" else "no shift")
        axis.set_xticks(SIZES, [str(n) for n in SIZES])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("unlabeled images, n")
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy on unseen emoji, %")
    axes[0, 0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(
    axis: Any,
    results: Results,
    shift: Shift,
    arm: str,
    sizes: Sequence[int],
    label: str,
    color: str,
    offset: float,
    linestyle: str = "-",
    **key: Any,
) -> None:
    spreads = [results.under(shift, arm=arm, n=n, **key) for n in sizes]
    points = [(n * offset, s.mean, s.sd or 0.0) for n, s in zip(sizes, spreads, strict=True) if s.mean is not None]
    if points:
        x, y, sd = zip(*points, strict=True)
        axis.errorbar(x, y, sd, color=color, marker="o", markersize=4, capsize=2, linestyle=linestyle, label=label)


def plot_severities(results: Results, path: Path) -> None:
    """Draw accuracy by severity, a panel a corruption."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(STRENGTHS), figsize=(15, 3.6), sharey=True, layout="constrained")
    for axis, kind in zip(axes, STRENGTHS, strict=True):
        for i, (label, key) in enumerate(arms_by_severity().items()):
            spreads = [results.under(("none", 0) if s == 0 else (kind, s), **key) for s in (0, *SEVERITIES)]
            known = [
                (s, v.mean, v.sd or 0.0) for s, v in zip((0, *SEVERITIES), spreads, strict=True) if v.mean is not None
            ]
            if known:
                x, y, sd = zip(*known, strict=True)
                style = {"color": ("black", "C7", "C0")[i], "linestyle": ("--", ":", "-")[i]}
                axis.errorbar(x, y, sd, marker="o", markersize=4, capsize=2, label=label, **style)
        axis.set(title=kind, xlabel="severity (0: none)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on unseen emoji, %")
    axes[0].legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(store: Store) -> str:
    """Write the summary, all tables and plots beside the store's file; return the tables."""
    results = Results(store.rows)
    store.finish(summarize(results))
    tables = {
        "": shift_table(results),
        "_priors": prior_table(results),
        "_severity": severity_table(results),
        "_mixed": mixed_table(results),
        "_tuned": tuned_table(results),
    }
    for suffix, text in tables.items():
        write_atomically(store.path.with_name(f"{PREFIX}{suffix}.md"), text)
    plot_sizes(results, store.path.with_name(f"{PREFIX}_sizes.png"))
    plot_severities(results, store.path.with_name(f"{PREFIX}_severity.png"))
    return "\n".join(tables.values())
