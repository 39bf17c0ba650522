"""GroupNorm in place of BatchNorm, fine-tuned: what eps does, at batch 1, 2, 4 and 16, beside frozen BatchNorm.

400 emoji of 64 pixels, by the protocol of scripts/compact.py, EfficientNet-Lite0 and then MobileNetV2. GroupNorm with
one group is calibrated on 256 training images without labels, with eps "normalize" (the default), "center" and "own";
each arm at its own learning rate, chosen on validation images by a seed that reports nothing. Rows that
scripts/study_advice.py and scripts/study_small_batch.py have are read from there.

Hardware: 2 CPU cores, half an hour a network. Resumes where it was cut off. Result:
results/study_group_norm_tuned.{json,md}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import advice_arms
import arms
from arms import Arm, Row, Rows
from compact import FAMILIES, Setting

from finetune_bn.utilities.files import write_atomically

BATCHES = (4, 2, 16, 1)  # in the order of importance
TITLES = {
    "none": "frozen BatchNorm",
    "group_norm": "GroupNorm, eps normalize",
    "group_norm_center": "GroupNorm, eps center",
    "group_norm_own": "GroupNorm, eps own",
}
PLAN = [
    Arm(Setting(family, batch, 400, "same"), arm) for family in FAMILIES for batch in BATCHES for arm in TITLES
]  # in the order of importance: a run that is cut off has the first ones
BY_NAME = {arm.setting.name: arm.setting for arm in PLAN}


def measure(setting: str, arm: str, lr: float, seed: int) -> dict[str, Any]:
    """Train one cell and return its figures."""
    return advice_arms.train_arm(BY_NAME[setting], arm, lr, seed)


def summarize(rows: Rows) -> Row:
    """Return the figures that the docs quote."""
    table = []
    for arm in sorted(PLAN, key=lambda arm: (list(FAMILIES).index(arm.setting.family), arm.setting.batch)):
        frozen = Arm(arm.setting, "none")
        seeds = arms.common(rows, PLAN, arm.setting)
        if one := arms.line(rows, arm, seeds):
            ahead = None if arm == frozen else arms.against(rows, arm, frozen, seeds)
            table.append(one | {"title": TITLES[arm.arm], "against_frozen": ahead})
    return {"table": table}


def markdown(summary: Row) -> str:
    """Return the table."""
    lines = []
    for one in summary["table"]:
        rate = f"{one['lr']:g}{' (edge)' if one['at_the_edge'] else ''}"
        ahead = one["against_frozen"]
        told = arms.difference(ahead) if ahead else ""
        accuracy = f"{one['test']:.1f} ± {one['sd']:.1f}"
        lines.append([one["family"], one["batch"], one["title"], rate, accuracy, told, one["seeds"]])
    head = ["network", "batch", "arm", "learning rate", "accuracy", "against frozen, 95 % interval", "seeds"]
    return arms.table(head, lines)


def write(rows: Rows, path: Path) -> Row:
    """Write the table, and return the summary."""
    summary = summarize(rows)
    write_atomically(path.with_suffix(".md"), markdown(summary))
    print(markdown(summary))
    return summary


if __name__ == "__main__":
    others = ["study_advice.json", "study_small_batch.json"]
    arms.run("study_group_norm_tuned", __doc__, PLAN, others, measure, write)
