"""The tables of `study_advice.py`: what each arm reached, what following a rule costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import study_advice as study
from compact import FAMILIES, LADDER
from store import Store

from finetune_bn.diagnosis import rule
from finetune_bn.utilities.files import write_atomically

SHIPPED = study.ROOT / "finetune_bn" / "diagnosis" / "measured.json"
GOOD = 1.0  # points: a treatment that is behind the best one by no more is as good
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
    for arm in study.ARMS:
        lr = study.chosen_rate(store, setting, arm)
        trained, score = ("live", "test/recalibrated") if arm == "recalibrated" else (arm, "test")
        rows = [r for r in store.rows if (r["setting"], r["arm"], r["lr"]) == (setting, trained, lr)]
        by_seed = {r["seed"]: r[score] for r in rows if r["seed"] in study.REPORT}
        if by_seed:
            found[arm] = by_seed
    return found


def finished(store: Store) -> dict[str, dict[str, dict[int, float]]]:
    """Return the settings all arms of which have two seeds or more, the same ones, with what they reached."""
    found = {}
    for setting in study.SETTINGS:
        arms = reached(store, setting.name)
        if set(arms) != set(study.ARMS):
            continue
        seeds = set.intersection(*(set(by_seed) for by_seed in arms.values()))
        if len(seeds) >= 2:
            found[setting.name] = {arm: {s: by_seed[s] for s in sorted(seeds)} for arm, by_seed in arms.items()}
    return found


def measured(store: Store, shifts: Mapping[str, Mapping[str, Any]]) -> list[rule.Measured]:
    """Return the finished settings as the rule reads them."""
    rows = []
    for name, arms in finished(store).items():
        setting = study.BY_NAME[name]
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
            )
        )
    return rows


def summarize(store: Store) -> dict[str, Any]:
    """Return the figures that the docs quote."""
    shifts = dict(store.summary.get("shifts", {}))
    for name in finished(store):
        shifts.setdefault(name, study.shift_of(study.BY_NAME[name]))
    rows = measured(store, shifts)
    table = []
    for name, arms in finished(store).items():
        lines = {}
        for arm, by_seed in arms.items():
            values = list(by_seed.values())
            lr = study.chosen_rate(store, name, arm)
            edge = lr in (LADDER[0], LADDER[-1])
            lines[arm] = {"test": fmean(values), "sd": stdev(values), "lr": lr, "at_the_edge": edge}
        table.append({"setting": name, "seeds": len(values), **shifts[name], "arms": lines})
    return {
        "shifts": shifts,
        "table": table,
        "regret": regrets(rows),
        "measured": [row.to_dict() for row in rows],
    }


def regrets(rows: list[rule.Measured]) -> dict[str, Any]:
    """Return what following each rule costs, in points behind the best arm of each setting.

    The advice for a setting is made from the other settings alone.
    """
    if len(rows) < 3:
        return {}
    rules: dict[str, list[float]] = {}
    taken = {}
    for row in rows:
        others = [other for other in rows if other is not row]
        followed = {"the advice": rule.recommend(row.setting, others)[0].arm, "rules of thumb": of_thumb(row)}
        followed |= {f"always {TITLES[arm]}": arm for arm in study.ARMS}
        taken[row.name] = followed["the advice"]
        for name, arm in followed.items():
            rules.setdefault(name, []).append(max(row.scores.values()) - row.scores[arm])
    lines = {
        name: {
            "mean": fmean(values),
            "sd": stdev(values),
            "worst": max(values),
            "good": 100 * fmean(value <= GOOD for value in values),
            "settings": len(values),
        }
        for name, values in rules.items()
    }
    return {"rules": lines, "advised": taken}


def of_thumb(row: rule.Measured) -> rule.Arm:
    """Return what is said everywhere: freeze where the set is small or the batch is, keep what is large."""
    small = row.setting.batch < 16 or (row.setting.images or 0) < 1000
    return "none" if small else "live"


def arms_table(summary: Mapping[str, Any]) -> str:
    """Return what every arm reached, a row a setting."""
    head = ["setting", "shift", "seeds", *(TITLES[arm] for arm in study.ARMS)]
    lines = [head, ["---"] * len(head)]
    for row in summary["table"]:
        best = max(one["test"] for one in row["arms"].values())
        figures = []
        for arm in study.ARMS:
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
    return "\n".join(lines)
