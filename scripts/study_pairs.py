"""Metric learning, fairly and at 128 pixels: does freezing still win, and what does proxy anchor do at small rates?

By the protocol of scripts/compact.py: batches of 16 emoji x 2 vendors, embeddings of 128 numbers, Recall@1 across
vendors of emoji that were not trained on. NT-Xent on 400 and 1600 images of 64 pixels, and on 400 that were enlarged to
128; proxy anchor on 400 of 64 pixels, with a ladder of rates that goes on below 1e-5. Arms: live as trained and
recalibrated, frozen, frozen with limited steps; each at its own rate, chosen on validation images by a seed that
reports nothing. NT-Xent at 64 pixels has five seeds, the rest three. Rows that scripts/study_advice.py has are read
from there. scripts/study_metric_learning.py has more arms and other batches, by an older protocol.

Hardware: 2 CPU cores, an hour. Resumes where it was cut off. Result: results/study_pairs.{json,md}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import advice_arms
import arms
from arms import Arm, Row, Rows
from compact import LADDER, Setting

from finetune_bn.utilities.files import write_atomically

TITLES = {
    "live": "live",
    "recalibrated": "live, recalibrated",
    "none": "frozen",
    "limited": "frozen, steps limited",
}
SEEDS = {64: (0, 1, 2, 3, 4), 128: (0, 1, 2)}
SMALL_RATES = (1e-7, 3e-7, 1e-6, 3e-6, *LADDER)
# In the order of importance: a run that is cut off has the first ones. Two of them are settings of study_advice.py.
SETTINGS = (
    Setting("lite0", 32, 400, "same", "pk"),
    Setting("mobilenetv2", 32, 1600, "same", "pk"),
    Setting("lite0", 32, 400, "same", "pk", side=128),
    Setting("lite0", 32, 400, "same", "pk", proxies=True),
    Setting("mobilenetv2", 32, 400, "same", "pk", side=128),
)
PLAN = [
    Arm(setting, arm, ladder=SMALL_RATES, first=(1e-5, 1e-4))
    if setting.proxies
    else Arm(setting, arm, SEEDS[setting.side])
    for setting in SETTINGS
    for arm in ("none", "live", "recalibrated", "limited")
]
BY_NAME = {setting.name: setting for setting in SETTINGS}


def measure(setting: str, arm: str, lr: float, seed: int) -> dict[str, Any]:
    """Train one cell and return its figures."""
    return advice_arms.train_arm(BY_NAME[setting], arm, lr, seed)


def margins(rows: Rows) -> list[Row]:
    """Return how far frozen layers are ahead of the live arm that validation of the choosing seed prefers."""
    found = []
    for setting in SETTINGS:
        mine = {arm.arm: arm for arm in PLAN if arm.setting == setting}
        best = arms.preferred(rows, [mine["live"], mine["recalibrated"]])
        if best and (one := arms.against(rows, mine["none"], best)):
            found.append(one | {"setting": setting.name, "other": TITLES[best.arm]})
    return found


def summarize(rows: Rows) -> Row:
    """Return the figures that README and docs quote."""
    table = []
    for arm in PLAN:
        seeds = arms.common(rows, PLAN, arm.setting)
        if one := arms.line(rows, arm, seeds):
            frozen = next(x for x in PLAN if (x.setting, x.arm) == (arm.setting, "none"))
            ahead = None if arm is frozen else arms.against(rows, frozen, arm, seeds)
            table.append(one | {"setting": arm.setting.name, "frozen_against_it": ahead})
    return {"table": table, "margin": margins(rows)}


def markdown(summary: Row) -> str:
    """Return the table."""
    lines = []
    for one in summary["table"]:
        rate = f"{one['lr']:g}{' (edge)' if one['at_the_edge'] else ''}"
        ahead = one["frozen_against_it"]
        told = arms.difference(ahead) if ahead else ""
        lines.append(
            [one["setting"], TITLES[one["arm"]], rate, f"{one['test']:.1f} ± {one['sd']:.1f}", told, one["seeds"]]
        )
    head = ["setting", "arm", "learning rate", "Recall@1", "frozen is ahead by, 95 % interval", "seeds"]
    return arms.table(head, lines)


def write(rows: Rows, path: Path) -> Row:
    """Write the table, and return the summary."""
    summary = summarize(rows)
    write_atomically(path.with_suffix(".md"), markdown(summary))
    print(markdown(summary))
    return summary


if __name__ == "__main__":
    arms.run("study_pairs", __doc__, PLAN, ["study_advice.json"], measure, write)
