"""Small batches: frozen BatchNorm against the best fair live arm, on two families of networks.

400 emoji of 64 pixels, batches of 2, 4, 16 and 64, by the protocol of scripts/compact.py; the arms and many cells are
those of scripts/study_advice.py, whose rows are read, and what they lack is measured here. Arms: live as trained, live
with its statistics recalibrated on training images, frozen (`none`, fixed before the study), frozen with limited steps;
each at its own learning rate. Beside the usual 4 epochs (8 at batch 64): four times as many at batch 4 and 2, and 100
steps for every batch size. Five seeds, three in 100 steps; the search of a rate at another length starts from the usual
one.

The best live arm is the one that is ahead on the validation images of the seed that chooses rates and reports nothing.
Differences are taken seed by seed, with 95 % intervals by Student's t. One whose interval holds 0, or that is smaller
than what seeds and machines move here (2.5 points), is called undecided.

Hardware: 2 CPU cores, an hour beside the rows of study_advice.py. Resumes where it was cut off. Result:
results/study_small_batch.{json,md,png}, results/study_small_batch_arms.md and results/study_small_batch_rates.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import advice_arms
import arms
from arms import Arm, Row, Rows
from compact import FAMILIES, LADDER, Setting

from finetune_bn.utilities.files import write_atomically

BATCHES = (4, 64, 16, 2)  # in the order of importance: a run that is cut off has the first ones
SEEDS = (0, 1, 2, 3, 4)
TITLES = {
    "live": "live",
    "recalibrated": "live, recalibrated",
    "none": "frozen",
    "limited": "frozen, steps limited",
}
LIVE, CHOSEN = ("live", "recalibrated"), "none"
LENGTHS = {"usual": "", "long": "4 times the epochs", "same": "100 steps"}


def setting_of(length: str, family: str, batch: int) -> Setting:
    """Return the setting of a cell."""
    usual = Setting(family, batch, 400, "same")
    steps = {"usual": usual.steps, "long": 4 * usual.steps, "same": 100}[length]
    return usual if steps == usual.steps else Setting(family, batch, 400, "same", length=steps)


def arm_of(length: str, family: str, batch: int, arm: str) -> Arm:
    """Return an arm of a length, network and batch size."""
    setting, usual = setting_of(length, family, batch), setting_of("usual", family, batch)
    if setting == usual:
        return Arm(setting, arm, SEEDS)
    return Arm(setting, arm, SEEDS if length == "long" else SEEDS[:3], after=usual)


PLAN = [
    arm_of(length, family, batch, arm)
    for length, batches, names in (
        ("usual", BATCHES, (CHOSEN, *LIVE)),
        ("long", (4,), ("recalibrated",)),
        ("usual", BATCHES, ("limited",)),
        ("same", (64, 4, 2), (CHOSEN, "recalibrated")),
        ("long", (4,), (CHOSEN,)),
        ("long", (2,), ("recalibrated",)),
    )
    for batch in batches
    for family in FAMILIES
    for arm in names
]
BY_NAME = {arm.setting.name: arm.setting for arm in PLAN}


def measure(setting: str, arm: str, lr: float, seed: int) -> dict[str, Any]:
    """Train one cell and return its figures."""
    return advice_arms.train_arm(BY_NAME[setting], arm, lr, seed)


def best_live(rows: Rows, family: str, batch: int) -> Arm | None:
    """Return the live arm that validation images of the choosing seed prefer, once both were searched."""
    return arms.preferred(rows, [arm_of("usual", family, batch, arm) for arm in LIVE])


def margins(rows: Rows) -> list[Row]:
    """Return what is compared: frozen with live of each length, limited with frozen."""
    lines = []
    for family in FAMILIES:
        for batch in sorted(BATCHES):
            frozen, best = arm_of("usual", family, batch, CHOSEN), best_live(rows, family, batch)
            pairs = [("best", frozen, best)] if best else []
            pairs.append(("long live", frozen, arm_of("long", family, batch, "recalibrated")))
            pairs += [
                (length, arm_of(length, family, batch, CHOSEN), arm_of(length, family, batch, "recalibrated"))
                for length in ("long", "same")
                if setting_of(length, family, batch) != frozen.setting
            ]
            pairs.append(("limited", arm_of("usual", family, batch, "limited"), frozen))
            found = [(kind, arm, other, arms.against(rows, arm, other)) for kind, arm, other in pairs]
            lines += [
                one | {"kind": kind, "arm": title(arm), "other": title(other)} for kind, arm, other, one in found if one
            ]
    return lines


def title(arm: Arm) -> str:
    """Return how tables call an arm."""
    of = arm.setting
    length = next(name for name in LENGTHS if setting_of(name, of.family, of.batch) == of)
    return TITLES[arm.arm] + (f", {LENGTHS[length]}" if LENGTHS[length] else "")


def summarize(rows: Rows) -> Row:
    """Return the figures that README and docs quote."""
    asked = sorted(PLAN, key=lambda arm: (list(FAMILIES).index(arm.setting.family), arm.setting.batch))
    lines = [(arm, arms.line(rows, arm, arms.common(rows, PLAN, arm.setting))) for arm in asked]
    rates = []
    for arm in asked:
        found = {f"{lr:g}": value for lr, value in sorted(arms.tried(rows, arm.setting.name, arm.arm).items())}
        if found and arm.after is None:
            rates.append({"family": arm.setting.family, "batch": arm.setting.batch, "arm": arm.arm, "by_rate": found})
    table = [one | {"title": title(arm)} for arm, one in lines if one]
    return {"table": table, "margin": margins(rows), "rates": rates}


def margin_table(summary: Row) -> str:
    """Return what is ahead of what."""
    return arms.table(
        ["network", "batch", "against", "accuracy", "arm", "accuracy", "difference, 95 % interval", "seeds"],
        [
            [
                *(one["family"], one["batch"], one["other"], f"{one['before']:.1f}", one["arm"]),
                *(f"{one['after']:.1f}", arms.difference(one), one["seeds"]),
            ]
            for one in summary["margin"]
        ],
    )


def arms_table(summary: Row) -> str:
    """Return what each arm reached."""
    return arms.table(
        ["network", "batch", "arm", "steps", "learning rate", "accuracy", "seeds"],
        [
            [
                *(one["family"], one["batch"], one["title"], one["steps"]),
                f"{one['lr']:g}{' (edge)' if one['at_the_edge'] else ''}",
                *(f"{one['test']:.1f} ± {one['sd']:.1f}", one["seeds"]),
            ]
            for one in summary["table"]
        ],
    )


def rates_table(summary: Row) -> str:
    """Return what each arm reached on validation images of the choosing seed, by learning rate."""
    rates = [lr for lr in LADDER if any(f"{lr:g}" in one["by_rate"] for one in summary["rates"])]
    lines = []
    for one in summary["rates"]:
        found = [one["by_rate"].get(f"{lr:g}") for lr in rates]
        told = ["" if value is None else f"{value:.1f}" for value in found]
        lines.append([one["family"], one["batch"], TITLES[one["arm"]], *told])
    return arms.table(["network", "batch", "arm", *(f"at {lr:g}" for lr in rates)], lines)


def plot(summary: Row, path: Path) -> None:
    """Draw accuracy by batch size, a panel for each network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(FAMILIES), figsize=(11, 4.2), layout="constrained", sharey=True)
    for axis, (family, name) in zip(axes, FAMILIES.items(), strict=True):
        for i, (arm, style) in enumerate((("live", "--"), ("recalibrated", "--"), ("none", "-"), ("limited", "-"))):
            lines = [x for x in summary["table"] if (x["family"], x["title"]) == (family, TITLES[arm])]
            axis.errorbar(
                [x["batch"] * 1.03 ** (i - 2) for x in lines],
                [x["test"] for x in lines],
                [x["sd"] for x in lines],
                **{"color": f"C{i}", "marker": "o", "capsize": 2, "linestyle": style, "label": TITLES[arm]},
            )
        axis.set(xscale="log", xlabel="batch size", title=name)
        axis.set_xticks(sorted(BATCHES), [str(b) for b in sorted(BATCHES)])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="accuracy on unseen emoji, %")
    axes[1].legend(title="BatchNorm")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(rows: Rows, path: Path) -> Row:
    """Write tables and plot, and return the summary."""
    summary = summarize(rows)
    write_atomically(path.with_suffix(".md"), margin_table(summary))
    write_atomically(path.with_name(f"{path.name}_arms.md"), arms_table(summary))
    write_atomically(path.with_name(f"{path.name}_rates.md"), rates_table(summary))
    plot(summary, path.with_suffix(".png"))
    print(margin_table(summary), arms_table(summary), rates_table(summary), sep="\n")
    return summary


if __name__ == "__main__":
    arms.run("study_small_batch", __doc__, PLAN, ["study_advice.json"], measure, write)
