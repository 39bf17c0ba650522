"""The tables of `study_advice.py`: what each arm reached, what following a rule costs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import advice_arms
import torch
from compact import FAMILIES, LADDER
from store import Store

from finetune_bn.diagnosis import rule
from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "finetune_bn" / "diagnosis" / "measured.json"
GOOD = 1.0  # points: a treatment that is behind the best one by no more is as good
OTHER_SEEDS = "the best arm by test figures of the other seeds"
NESTED = "the advice, its two constants chosen without the setting too"
GRID = tuple(itertools.product((0.5, 1.0, 2.0, 4.0), (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)))  # of `REACH` and `PRIOR`
LUCK = 2000  # draws of the errors of all figures
TITLES = {
    "live": "live",
    "recalibrated": "live, recalibrated",
    "scheduled": "live, then frozen",
    "none": "frozen",
    "original": "frozen, affine trained",
    "limited": "frozen, steps limited",
    "group_norm": "GroupNorm",
    "affine": "affine and head only",
}


def write(store: Store, out: Path) -> None:
    """Write the JSON's summary, the table that the package ships, and the Markdown table."""
    summary = summarize(store)
    store.finish(summary)
    if summary["measured"]:
        write_atomically(SHIPPED, json.dumps(summary["measured"], indent=1) + "\n")
    write_atomically(out / "study_advice.md", arms_table(summary) + "\n")
    write_atomically(out / "study_advice_regret.md", regret_table(summary) + "\n")


def reached(store: Store, setting: str) -> dict[str, dict[int, float]]:
    """Return the test figure by seed of each arm of a setting whose rate is chosen."""
    found: dict[str, dict[int, float]] = {}
    for arm in advice_arms.ARMS:
        lr = advice_arms.chosen_rate(store, setting, arm)
        trained, score = ("live", "test/recalibrated") if arm == "recalibrated" else (arm, "test")
        rows = [r for r in store.rows if (r["setting"], r["arm"], r["lr"]) == (setting, trained, lr)]
        by_seed = {r["seed"]: r[score] for r in rows if r["seed"] in advice_arms.REPORT}
        if by_seed:
            found[arm] = by_seed
    return found


def finished(store: Store) -> dict[str, dict[str, dict[int, float]]]:
    """Return the settings all arms of which have two seeds or more, the same ones, with what they reached."""
    found = {}
    for setting in advice_arms.SETTINGS:
        arms = reached(store, setting.name)
        if set(arms) != set(advice_arms.ARMS):
            continue
        seeds = set.intersection(*(set(by_seed) for by_seed in arms.values()))
        if len(seeds) >= 2:
            found[setting.name] = {arm: {s: by_seed[s] for s in sorted(seeds)} for arm, by_seed in arms.items()}
    return found


def measured(store: Store, shifts: Mapping[str, Mapping[str, Any]]) -> list[rule.Measured]:
    """Return the finished settings as the rule reads them."""
    rows = []
    for name, arms in finished(store).items():
        setting = advice_arms.BY_NAME[name]
        means = {arm: fmean(by_seed.values()) for arm, by_seed in arms.items()}
        rows.append(
            rule.Measured(
                name=name,
                setting=rule.Setting(
                    batch=setting.batch,
                    images=setting.images,
                    shift=shifts[name]["shift"],
                    iid=setting.sampler == "iid",
                    images_per_label=None if setting.sampler == "iid" else 2.0,
                    log_var=shifts[name]["log_var"],
                    family=FAMILIES[setting.family],
                ),
                scores=means,
                seeds=len(next(iter(arms.values()))),
                rates={arm: advice_arms.chosen_rate(store, name, arm) for arm in arms},
            )
        )
    return rows


def summarize(store: Store) -> dict[str, Any]:
    """Return the figures that the docs quote."""
    shifts = dict(store.summary.get("shifts", {}))
    for name in finished(store):
        shifts.setdefault(name, advice_arms.shift_of(advice_arms.BY_NAME[name]))
    rows = measured(store, shifts)
    table = []
    for name, arms in finished(store).items():
        lines = {}
        for arm, by_seed in arms.items():
            values = list(by_seed.values())
            lr = advice_arms.chosen_rate(store, name, arm)
            edge = lr in (LADDER[0], LADDER[-1])
            lines[arm] = {"test": fmean(values), "sd": stdev(values), "lr": lr, "at_the_edge": edge}
        table.append({"setting": name, "seeds": len(values), **shifts[name], "arms": lines})
    return {
        "shifts": shifts,
        "table": table,
        "regret": regrets(rows, finished(store), {name: by_validation(store, name) for name in finished(store)}),
        "measured": [row.to_dict() for row in rows],
    }


def regrets(
    rows: list[rule.Measured],
    by_seed: Mapping[str, Mapping[str, Mapping[int, float]]],
    compared: Mapping[str, list[str]],
) -> dict[str, Any]:
    """Return what following each rule costs, in points behind the arm with the best mean test figure.

    The advice for a setting is made from the other settings alone.

    Args:
        rows: the settings as the rule reads them.
        by_seed: the test figure by setting, arm and seed.
        compared: the arms of each setting in the order that validation of the choosing seed puts them into.
    """
    if len(rows) < 3:
        return {}
    lost: dict[str, list[float]] = {NESTED: nested(rows)}
    taken = {}
    for row in rows:
        ranked = [choice.arm for choice in rule.recommend(row.setting, [other for other in rows if other is not row])]
        taken[row.name] = ranked[0]
        followed = {"the advice": ranked[0], "rules of thumb": of_thumb(row)}
        followed["all arms compared, one seed"] = compared[row.name][0]
        for first in (2, 3):
            followed[f"the first {first} of the advice compared, one seed"] = next(
                arm for arm in compared[row.name] if arm in ranked[:first]
            )
        followed |= {f"always {TITLES[arm]}": arm for arm in advice_arms.ARMS}
        for name, arm in followed.items():
            lost.setdefault(name, []).append(row.lost[arm])
        lost.setdefault(OTHER_SEEDS, []).append(chosen_on_other_seeds(by_seed[row.name]))
    lines = {
        name: {
            "mean": fmean(values),
            "sd": stdev(values),
            "worst": max(values),
            "good": 100 * fmean(value <= GOOD for value in values),
            "settings": len(values),
        }
        for name, values in lost.items()
    }
    return {"rules": lines, "advised": taken, "luck": luck(by_seed)}


def nested(rows: list[rule.Measured]) -> list[float]:
    """Return what the advice costs in each setting, with the constants that cost least in the others.

    Cross-validation within cross-validation: the constants for a setting are chosen by leaving each of the others out
    in turn, and the setting itself is in none of these.
    """
    found = []
    for row in rows:
        others = [other for other in rows if other is not row]
        cost = {
            constants: fmean(
                _followed(other, [third for third in others if third is not other], *constants) for other in others
            )
            for constants in GRID
        }
        found.append(_followed(row, others, *min(GRID, key=lambda constants: cost[constants])))
    return found


def _followed(row: rule.Measured, others: list[rule.Measured], reach: float, prior: float) -> float:
    """Return what the advice made from other settings costs in one."""
    return row.lost[rule.recommend(row.setting, others, reach, prior)[0].arm]


def by_validation(store: Store, setting: str) -> list[str]:
    """Return the arms of a setting, the one first that is ahead on validation images of the choosing seed."""
    return sorted(advice_arms.ARMS, key=lambda arm: -max(advice_arms.tried(store, setting, arm).values()))


def chosen_on_other_seeds(arms: Mapping[str, Mapping[int, float]]) -> float:
    """Return how far behind the best mean an arm is that was chosen, for each seed, by test figures of the others."""
    found = []
    for seed in next(iter(arms.values())):
        others = {name: fmean(v for s, v in scores.items() if s != seed) for name, scores in arms.items()}
        found.append(arms[max(others, key=lambda name: others[name])][seed])
    return max(fmean(scores.values()) for scores in arms.values()) - fmean(found)


def luck(by_seed: Mapping[str, Mapping[str, Mapping[int, float]]]) -> dict[str, float]:
    """Return the regret that a rule which knew the best arm would be found to have, because figures have errors.

    Simulated: the measured means are taken for true, and each gets an error as large as that of its setting (the
    spread of an arm over seeds that is left after what a seed does to all arms).
    """
    draw = torch.Generator().manual_seed(0)
    means, good, noise = [], [], []
    for arms in by_seed.values():
        scores = torch.tensor([list(values.values()) for values in arms.values()], dtype=torch.float64)
        left = scores - scores.mean(1, keepdim=True) - scores.mean(0) + scores.mean()
        count, seeds = scores.shape
        error = math.sqrt(left.square().sum().item() / ((count - 1) * (seeds - 1)) / seeds)
        true = scores.mean(1)
        seen = true + error * torch.randn(LUCK, count, generator=draw, dtype=torch.float64)
        lost = seen.max(1).values - seen[:, true.argmax()]
        means.append(lost.mean().item())
        good.append((lost <= GOOD).double().mean().item())
        noise.append(error)
    return {"mean": fmean(means), "good": 100 * fmean(good), "error": fmean(noise)}


def of_thumb(row: rule.Measured) -> rule.Arm:
    """Return what is said everywhere: freeze where the set is small or the batch is, keep what is large."""
    small = row.setting.batch < 16 or (row.setting.images or 0) < 1000
    return "none" if small else "live"


def arms_table(summary: Mapping[str, Any]) -> str:
    """Return what every arm reached, a row a setting."""
    head = ["setting", "shift", "seeds", *(TITLES[arm] for arm in advice_arms.ARMS)]
    lines = [head, ["---"] * len(head)]
    for row in summary["table"]:
        best = max(one["test"] for one in row["arms"].values())
        figures = []
        for arm in advice_arms.ARMS:
            one = row["arms"][arm]
            text = f"{one['test']:.1f} ± {one['sd']:.1f}"
            text = f"**{text}**" if best - one["test"] <= GOOD else text
            figures.append(f"{text}, {one['lr']:.0e}{' (edge)' if one['at_the_edge'] else ''}".replace("e-0", "e-"))
        lines.append([row["setting"], f"{row['shift']:.2f}", str(row["seeds"]), *figures])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def regret_table(summary: Mapping[str, Any]) -> str:
    """Return what following each rule costs."""
    lines = [
        "| rule | mean regret, points | sd | worst | within 1 point of the best |",
        "| --- | --- | --- | --- | --- |",
    ]
    found = summary["regret"].get("rules", {})
    for name, one in sorted(found.items(), key=lambda item: item[1]["mean"]):
        share = f"{one['good']:.0f} % of {one['settings']}"
        lines.append(f"| {name} | {one['mean']:.2f} | {one['sd']:.2f} | {one['worst']:.1f} | {share} |")
    if "luck" in summary["regret"]:
        one = summary["regret"]["luck"]
        lines.append(f"| the best arm, if it were known (simulated) | {one['mean']:.2f} | | | {one['good']:.0f} % |")
    return "\n".join(lines)
