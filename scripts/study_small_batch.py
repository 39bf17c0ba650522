"""Small batches: frozen BatchNorm against the best fair live arm, on two families of networks.

400 emoji of 64 pixels, batches of 2, 4, 16 and 64, by the protocol of scripts/compact.py; the arms and the cells of
seeds 0 to 2 are those of scripts/study_advice.py, whose rows are read, and what they lack is measured here. Arms: live
as trained, live with its statistics recalibrated on training images, frozen (`none`, fixed before the study), frozen
with limited steps; each at its own learning rate. Beside the usual 4 epochs (8 at batch 64): four times as many (`x4`;
at batch 4 and 2), and 100 steps for every batch size. Five seeds, three for the other lengths, whose search of a rate
starts from the usual one.

The best live arm is the one that is ahead on the validation images of the seed that chooses rates and reports nothing.
Differences are taken seed by seed, with 95 % intervals by Student's t. One whose interval holds 0, or that is smaller
than what seeds and machines move here (2.5 points), is called undecided.

Hardware: 2 CPU cores, about an hour beside the rows of study_advice.py. Resumes where it was cut off. Result:
results/study_small_batch.{json,md,png} and results/study_small_batch_margin.md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import cells
import study_advice
import torch
from compact import CHOOSE, FAMILIES, FIRST_RUNGS, LADDER, Setting, missing
from store import Store

from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
BATCHES = (4, 64, 2, 16)  # in the order of importance: a run that is cut off has the first ones
SEEDS = (0, 1, 2, 3, 4)
ARMS = {
    "live": "live",
    "recalibrated": "live, recalibrated",
    "none": "frozen",
    "limited": "frozen, steps limited",
}
LIVE, CHOSEN = ("live", "recalibrated"), "none"
LENGTHS = {"usual": "", "x4": "4 times the epochs", "same": "100 steps"}
# Length, batch sizes, arms, seeds; most important first.
PLAN: tuple[tuple[str, tuple[int, ...], tuple[str, ...], tuple[int, ...]], ...] = (
    ("usual", BATCHES, ("none", *LIVE), SEEDS),
    ("x4", (4, 2), ("recalibrated",), SEEDS[:3]),
    ("same", (64, 4, 2), ("none", "recalibrated"), SEEDS[:3]),
    ("x4", (4,), ("none",), SEEDS[:3]),
    ("usual", BATCHES, ("limited",), SEEDS),
)
Rows = Sequence[dict[str, Any]]


def setting_of(length: str, family: str, batch: int) -> Setting:
    """Return the setting of a cell."""
    usual = Setting(family, batch, 400, "same")
    steps = {"usual": usual.steps, "x4": 4 * usual.steps, "same": 100}[length]
    return usual if steps == usual.steps else Setting(family, batch, 400, "same", length=steps)


BY_NAME = {
    setting.name: setting
    for length in LENGTHS
    for family in FAMILIES
    for batch in BATCHES
    for setting in (setting_of(length, family, batch),)
}


def measure(setting: str, arm: str, lr: float, seed: int) -> dict[str, Any]:
    """Train one cell and return its figures."""
    return study_advice.train_arm(BY_NAME[setting], arm, lr, seed)


def shared(path: Path) -> Rows:
    """Return the rows of study_advice.py that are cells of this study."""
    if not path.exists():
        return []
    return [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["setting"] in BY_NAME]


def of_arm(rows: Rows, setting: Setting, arm: str, part: str) -> dict[tuple[float, int], float]:
    """Return an arm's figure of validation or test images by learning rate and seed."""
    trained, score = ("live", f"{part}/recalibrated") if arm == "recalibrated" else (arm, part)
    mine = (row for row in rows if (row["setting"], row["arm"]) == (setting.name, trained))
    return {(row["lr"], row["seed"]): row[score] for row in mine}


def tried(rows: Rows, setting: Setting, arm: str) -> dict[float, float]:
    """Return the validation figure of the choosing seed by learning rate."""
    return {lr: value for (lr, seed), value in of_arm(rows, setting, arm, "val").items() if seed == CHOOSE}


def first_rungs(rows: Rows, setting: Setting, arm: str) -> tuple[float, ...]:
    """Return where an arm's search starts; none where that is not known yet."""
    usual = setting_of("usual", setting.family, setting.batch)
    if setting == usual:
        return FIRST_RUNGS
    lr = chosen_rate(rows, usual, arm)
    return () if lr is None else (lr,)


def chosen_rate(rows: Rows, setting: Setting, arm: str) -> float | None:
    """Return an arm's learning rate once its search is over."""
    first = first_rungs(rows, setting, arm)
    return cells.chosen_rate(tried(rows, setting, arm), LADDER, first) if first else None


def next_cells(advice: Path, batches: Sequence[int], store: Store) -> Iterator[dict[str, Any]]:
    """Yield the cells that can be measured now, most important first; more appear as results come in."""
    rows = [*store.rows, *shared(advice)]
    done = {(row["setting"], row["arm"], row["lr"], row["seed"]) for row in rows}
    for length, of_plan, arms, seeds in PLAN:
        for batch in (b for b in of_plan if b in batches):
            for family in FAMILIES:
                setting = setting_of(length, family, batch)
                if missing(setting) is not None:
                    continue
                for arm in arms:
                    first = first_rungs(rows, setting, arm)
                    rates = cells.rates_to_try(tried(rows, setting, arm), LADDER, first) if first else []
                    lr = chosen_rate(rows, setting, arm)
                    wanted = [(rate, CHOOSE) for rate in rates] + [(lr, seed) for seed in seeds if lr is not None]
                    trained = "live" if arm == "recalibrated" else arm
                    for rate, seed in wanted:
                        if (setting.name, trained, rate, seed) not in done:
                            yield {"setting": setting.name, "arm": trained, "lr": rate, "seed": seed}


def reached(rows: Rows, length: str, family: str, batch: int, arm: str) -> dict[int, float]:
    """Return an arm's test figure by seed, at its learning rate."""
    setting = setting_of(length, family, batch)
    lr = chosen_rate(rows, setting, arm)
    found = {seed: value for (rate, seed), value in of_arm(rows, setting, arm, "test").items() if rate == lr}
    return {seed: found[seed] for seed in SEEDS if seed in found}


def against(rows: Rows, family: str, batch: int, arm: tuple[str, str], other: tuple[str, str]) -> dict[str, Any] | None:
    """Return by how much one (length, arm) is ahead of another, seed by seed; None with less than two seeds."""
    mine, theirs = (reached(rows, length, family, batch, name) for length, name in (arm, other))
    seeds = sorted(mine.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    points, low, high = cells.interval([mine[seed] - theirs[seed] for seed in seeds])
    return {
        "family": family, "batch": batch, "arm": arm, "other": other, "seeds": len(seeds),
        "before": fmean(theirs[seed] for seed in seeds), "after": fmean(mine[seed] for seed in seeds),
        "points": points, "low": low, "high": high, "decided": cells.decided(points, low, high),
    }  # fmt: skip


def best_live(rows: Rows, family: str, batch: int) -> str | None:
    """Return the live arm that validation images of the choosing seed prefer, once both were searched."""
    setting = setting_of("usual", family, batch)
    if any(chosen_rate(rows, setting, arm) is None for arm in LIVE):
        return None
    return max(LIVE, key=lambda arm: max(tried(rows, setting, arm).values()))


def margins(rows: Rows) -> list[dict[str, Any]]:
    """Return what is compared: frozen with live of each length, limited with frozen."""
    lines = []
    for family in FAMILIES:
        for batch in sorted(BATCHES):
            best, frozen = best_live(rows, family, batch), ("usual", CHOSEN)
            lines += [against(rows, family, batch, frozen, ("usual", best))] if best else []
            lines.append(against(rows, family, batch, frozen, ("x4", "recalibrated")))
            lines.append(against(rows, family, batch, ("x4", CHOSEN), ("x4", "recalibrated")))
            if setting_of("same", family, batch) != setting_of("usual", family, batch):
                lines.append(against(rows, family, batch, ("same", CHOSEN), ("same", "recalibrated")))
            lines.append(against(rows, family, batch, ("usual", "limited"), frozen))
    return [line for line in lines if line]


def summarize(rows: Rows) -> dict[str, Any]:
    """Return the figures that README and docs quote."""
    table = []
    for family in FAMILIES:
        for batch in sorted(BATCHES):
            for length, arm in ((length, arm) for length in LENGTHS for arm in ARMS):
                setting = setting_of(length, family, batch)
                if length != "usual" and setting == setting_of("usual", family, batch):
                    continue
                values = list(reached(rows, length, family, batch, arm).values())
                if len(values) > 1:
                    lr = chosen_rate(rows, setting, arm)
                    line = {"family": family, "batch": batch, "length": length, "arm": arm, "steps": setting.steps}
                    line |= {"lr": lr, "at_the_edge": lr in (LADDER[0], LADDER[-1]), "seeds": len(values)}
                    table.append(line | {"test": fmean(values), "sd": stdev(values)})
    used = [row for row in rows if row["setting"] in BY_NAME]
    return {"table": table, "margin": margins(rows), "commits": Counter(row.get("commit", "before") for row in used)}


def title(length: str, arm: str) -> str:
    """Return how tables call an arm."""
    return ARMS[arm] + (f", {LENGTHS[length]}" if LENGTHS[length] else "")


def margin_table(summary: dict[str, Any]) -> str:
    """Return what is ahead of what."""
    head = "| network | batch | against | accuracy | arm | accuracy | difference, 95 % interval | seeds |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for one in summary["margin"]:
        told = f"{one['points']:+.1f} ({one['low']:+.1f} to {one['high']:+.1f})"
        told = f"**{told}**" if one["decided"] else f"{told}: undecided"
        other, arm = title(*one["other"]), title(*one["arm"])
        lines.append(
            f"| {one['family']} | {one['batch']} | {other} | {one['before']:.1f} | {arm} | {one['after']:.1f} "
            f"| {told} | {one['seeds']} |"
        )
    return "\n".join(lines) + "\n"


def arms_table(summary: dict[str, Any]) -> str:
    """Return what each arm reached."""
    lines = ["| network | batch | arm | steps | learning rate | accuracy | seeds |", "|---|---|---|---|---|---|---|"]
    for one in summary["table"]:
        rate = f"{one['lr']:g}{' (edge)' if one['at_the_edge'] else ''}"
        lines.append(
            f"| {one['family']} | {one['batch']} | {title(one['length'], one['arm'])} | {one['steps']} | {rate} "
            f"| {one['test']:.1f} ± {one['sd']:.1f} | {one['seeds']} |"
        )
    return "\n".join(lines) + "\n"


def plot(summary: dict[str, Any], path: Path) -> None:
    """Draw accuracy by batch size, a panel for each network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(FAMILIES), figsize=(11, 4.2), layout="constrained", sharey=True)
    for axis, (family, name) in zip(axes, FAMILIES.items(), strict=True):
        drawn = [("usual", arm) for arm in ARMS] + [("x4", "recalibrated")]
        for i, (length, arm) in enumerate(drawn):
            style = {"color": f"C{i}", "marker": "o", "ls": "-" if arm in ("none", "limited") else "--"}
            lines = [x for x in summary["table"] if (x["family"], x["length"], x["arm"]) == (family, length, arm)]
            axis.errorbar(
                [x["batch"] * 1.03 ** (i - 2) for x in lines], [x["test"] for x in lines], [x["sd"] for x in lines],
                capsize=2, label=title(length, arm), **style,
            )  # fmt: skip
        axis.set(xscale="log", xlabel="batch size", title=name)
        axis.set_xticks(sorted(BATCHES), [str(b) for b in sorted(BATCHES)])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="accuracy on unseen emoji, %")
    axes[1].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run the study, or only write its tables anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument(
        "--batches", type=int, nargs="+", choices=BATCHES, default=BATCHES, help="only these batch sizes"
    )
    parser.add_argument("--advice", type=Path, default=ROOT / "results/study_advice.json", help="rows to begin with")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    parser.add_argument("--report-only", action="store_true", help="write tables and plot from the rows there are")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(args.out / "study_small_batch.json", "python scripts/study_small_batch.py", (CHOOSE, *SEEDS), "cpu")
    if not args.report_only:
        cells.run(store, partial(next_cells, args.advice, args.batches), measure, args.workers, "val")
    summary = summarize([*store.rows, *shared(args.advice)])
    store.finish(summary)
    write_atomically(store.path.with_suffix(".md"), arms_table(summary))
    write_atomically(store.path.with_name("study_small_batch_margin.md"), margin_table(summary))
    plot(summary, store.path.with_suffix(".png"))
    print(margin_table(summary), arms_table(summary), sep="\n")


if __name__ == "__main__":
    main()
