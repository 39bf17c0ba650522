"""Small batches: live BatchNorm against the four frozen-affine kinds, each at its own best learning rate.

EfficientNet-Lite0 with its ImageNet weights, 9 emoji categories, 600 training images of 64 pixels (some 500 emoji by
three vendors), AdamW, 5 epochs, warm-up and cosine; accuracy on emoji that no vendor showed in training. A learning
rate is chosen once per arm and batch size, by validation accuracy at seed 0, from one ladder that all arms share: the
search starts with three rungs and goes on while the best one is at an edge. Three seeds; a seed sets the split, the
subset, the head and the order, and is the same for all arms. At batch 4 the whole ladder is run with every seed, for
the range of learning rates that an arm tolerates.

Hardware: 2 CPU cores, about two hours. Resumes where it was cut off. Result: results/study_small_batch.{json,md,png}.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import cells
import torch
import torch.nn.functional as F
from store import Store
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.functional.frozen import between_image_spread
from finetune_bn.optim.step_limit import limit_steps
from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
ARMS: dict[str, fbn.Policy] = {
    "live": fbn.Keep(),
    "none": fbn.Freeze("none"),
    "shift": fbn.Freeze("shift"),
    "merged": fbn.Freeze("merged"),
    "original": fbn.Freeze("original"),
    "limited": fbn.Freeze("none"),  # with the steps of the optimizer limited
}
BATCHES = (4, 16, 64, 2)  # in the order of importance: a run that is cut off has the first ones
SEEDS = (0, 1, 2)
LADDER = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
FIRST_RUNGS = (2e-4, 5e-4, 1e-3)
ONLY_AT_BATCH_4 = ("limited",)
CHOSEN = "none"  # the frozen arm that stands for all in the comparison with live, fixed before the study
RANGE_RUNGS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
TRAIN_IMAGES, EPOCHS = 600, 5

_splits: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}


def images(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (images, labels) of the splits, decoded once; test splits by vendor."""
    from finetune_bn.data import EmojiData

    if seed not in _splits:
        data = EmojiData(
            target="category", train_size=TRAIN_IMAGES, seed=seed, augment="none", mean=(0.5,) * 3, std=(0.5,) * 3
        )
        data.setup("fit")
        data.setup("test")

        def stack(loader: Any) -> tuple[Tensor, Tensor]:
            batches = list(loader)
            return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

        splits = {"train": stack(data.iid_dataloader("train", batch_size=100))}
        val = [stack(loader) for loader in data.val_dataloader()]
        splits["val"] = torch.cat([x for x, _ in val]), torch.cat([y for _, y in val])
        for vendor, loader in zip(data.domains, data.test_dataloader(), strict=True):
            splits[vendor] = stack(loader)
        _splits[seed] = splits
    return _splits[seed]


def fine_tune(arm: str, batch: int, lr: float, seed: int) -> dict[str, Any]:
    """Train one cell and return its figures."""
    from finetune_bn.backbones.create import create_backbone

    torch.manual_seed(seed)
    net = create_backbone("tf_efficientnet_lite0", "package", num_classes=9)
    return train(fbn.convert(net, ARMS[arm], verify=False), batch, lr, seed, limited=arm == "limited")


def train(net: nn.Module, batch: int, lr: float, seed: int, limited: bool = False) -> dict[str, Any]:
    """Train a network whose layers are what they are to be, with limited steps or without, and return its figures."""
    splits = images(seed)
    x, y = splits["train"]
    steps = EPOCHS * math.ceil(len(x) / batch)
    optimizer, schedule = cells.adamw(net, lr, steps)
    if limited:
        limit_steps(optimizer, net)
    started = time.perf_counter()
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        net.train()
        total = 0.0
        for rows in torch.randperm(len(x), generator=order).split(batch):
            loss = F.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
    result = {"train_loss": total / len(x), "seconds": time.perf_counter() - started}
    net.eval()
    hits: dict[str, Tensor] = {}
    for name, (inputs, labels) in splits.items():
        if name != "train":
            logits, spread = predict(net, inputs)
            hits[name] = (logits.argmax(1) == labels).float()
            result |= {"spread": spread, "collapsed": not spread >= 1e-3} if name == "val" else {}
    result["val_accuracy"] = 100 * hits.pop("val").mean().item()
    result["test_accuracy"] = 100 * torch.cat(list(hits.values())).mean().item()
    return result | {f"test_accuracy/{vendor}": 100 * hit.mean().item() for vendor, hit in hits.items()}


@torch.inference_mode()
def predict(net: nn.Module, inputs: Tensor) -> tuple[Tensor, float]:
    """Return the logits, and by how much images differ in the features behind them."""
    features = [net.forward_head(net.forward_features(x), pre_logits=True) for x in inputs.split(128)]  # type: ignore[operator]
    together = torch.cat(features)
    logits = net.get_classifier()(together)  # type: ignore[operator]
    spread = between_image_spread(together) if torch.isfinite(together).all() else float("nan")
    return logits.nan_to_num(), spread


def next_cells(store: Store) -> Iterator[dict[str, Any]]:
    """Yield the cells that can be measured now, most important first; more appear as results come in."""
    for batch in BATCHES:
        arms = arms_at(batch)
        for arm in arms:
            missing = cells.rates_to_try(tried_rates(store, arm, batch), LADDER, FIRST_RUNGS)
            yield from (cell(arm, batch, lr, 0) for lr in missing)
        chosen = [(arm, chosen_rate(store, arm, batch)) for arm in arms]
        repeats = [cell(arm, batch, lr, seed) for seed in SEEDS[1:] for arm, lr in chosen if lr is not None]
        if batch == BATCHES[0]:
            repeats += [cell(arm, batch, lr, seed) for seed in SEEDS for arm in arms for lr in RANGE_RUNGS]
        yield from (key for key in repeats if not store.done(key))


def arms_at(batch: int) -> list[str]:
    """Return the arms that are measured at a batch size."""
    return [arm for arm in ARMS if batch == BATCHES[0] or arm not in ONLY_AT_BATCH_4]


def cell(arm: str, batch: int, lr: float, seed: int) -> dict[str, Any]:
    """Return the key of a cell."""
    return {"arm": arm, "batch": batch, "lr": lr, "seed": seed}


def tried_rates(store: Store, arm: str, batch: int) -> dict[float, float]:
    """Return the validation accuracy at seed 0 by learning rate."""
    rows = (r for r in store.rows if (r["arm"], r["batch"], r["seed"]) == (arm, batch, 0))
    return {row["lr"]: row["val_accuracy"] for row in rows}


def chosen_rate(store: Store, arm: str, batch: int) -> float | None:
    """Return the arm's learning rate once the search is over: the best rung and both its neighbors were run."""
    return cells.chosen_rate(tried_rates(store, arm, batch), LADDER, FIRST_RUNGS)


def summarize(store: Store) -> dict[str, Any]:
    """Return the figures that the README quotes."""
    table, margins = [], {}
    for batch in sorted(BATCHES):
        for arm in ARMS:
            lr = chosen_rate(store, arm, batch)
            rows = [r for r in store.rows if (r["arm"], r["batch"], r["lr"]) == (arm, batch, lr)]
            if not rows:
                continue
            keys = sorted(k for k in rows[0] if k.startswith("test_accuracy"))
            line: dict[str, Any] = {"batch": batch, "arm": arm, "lr": lr, "seeds": len(rows)}
            for key in keys:
                values = [row[key] for row in rows]
                line[key] = fmean(values)
                line[f"{key} sd"] = stdev(values) if len(values) > 1 else None
            table.append(line)
        margin = against_live(store, batch)
        if margin:
            margins[str(batch)] = margin
    ranges = tolerated_rates(store)
    return {"table": table, "margin": margins, "range": ranges, "robust": robustness(ranges)}


def against_live(store: Store, batch: int) -> dict[str, Any] | None:
    """Return by how much the arm that was fixed in advance is ahead of live, seed by seed: mean and interval.

    Not the best of the frozen arms: that one is chosen on the test images that it is compared on.
    """
    rates = {arm: chosen_rate(store, arm, batch) for arm in (CHOSEN, "live")}
    found = {
        arm: {r["seed"]: r["test_accuracy"] for r in store.rows if (r["arm"], r["batch"], r["lr"]) == (arm, batch, lr)}
        for arm, lr in rates.items()
    }
    seeds = sorted(found[CHOSEN].keys() & found["live"].keys())
    if len(seeds) < 2:
        return None
    points, low, high = cells.interval([found[CHOSEN][seed] - found["live"][seed] for seed in seeds])
    return {"arm": CHOSEN, "seeds": len(seeds), "points_above_live": points, "interval": [low, high]}


def tolerated_rates(store: Store, batch: int = BATCHES[0], within: float = 3.0) -> list[dict[str, Any]]:
    """Return, per arm, mean accuracy by learning rate and the rates within some points of the arm's best."""
    lines = []
    for arm in ARMS:
        means: dict[float, float] = {}
        for lr in RANGE_RUNGS:
            values = [r["test_accuracy"] for r in store.rows if (r["arm"], r["batch"], r["lr"]) == (arm, batch, lr)]
            if len(values) == len(SEEDS):
                means[lr] = fmean(values)
        if len(means) == len(RANGE_RUNGS):
            good = [lr for lr, value in means.items() if value >= max(means.values()) - within]
            ran = [r for r in store.rows if (r["arm"], r["batch"]) == (arm, batch) and r["lr"] in RANGE_RUNGS]
            collapsed = sum(r["collapsed"] for r in ran)
            accuracy = {f"{lr:g}": value for lr, value in means.items()}
            ratio = max(good) / min(good)
            lines.append({"arm": arm, "accuracy": accuracy, "within": good, "ratio": ratio, "collapsed": collapsed})
    return lines


def robustness(ranges: list[dict[str, Any]], within: float = 4.0) -> dict[str, Any] | None:
    """Return the rates that the frozen arm tolerates without and with limited steps.

    A rate is tolerated where it and all between it and the best are within some points of the arm's own best.
    """
    accuracy = {line["arm"]: {float(lr): value for lr, value in line["accuracy"].items()} for line in ranges}
    if "limited" not in accuracy or "none" not in accuracy:
        return None
    tolerated = {}
    for arm in ("none", "limited"):
        values = sorted(accuracy[arm].items())
        top = max(range(len(values)), key=lambda i: values[i][1])
        low = high = top
        while low and values[low - 1][1] >= values[top][1] - within:
            low -= 1
        while high + 1 < len(values) and values[high + 1][1] >= values[top][1] - within:
            high += 1
        tolerated[arm] = [values[low][0], values[high][0]]
    return {"within": within, "tolerated": tolerated}


def markdown(summary: dict[str, Any]) -> str:
    """Return the summary as tables."""
    vendors = [k for k in (summary["table"] or [{}])[0] if k.startswith("test_accuracy/") and not k.endswith(" sd")]
    head = ["batch", "arm", "learning rate", "seeds", "accuracy", *(v.split("/")[1] for v in vendors)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]

    def figure(line: dict[str, Any], key: str) -> str:
        spread = line[f"{key} sd"]
        return f"{line[key]:.1f}" + ("" if spread is None else f" ± {spread:.1f}")

    whole = [line for line in summary["table"] if line["seeds"] == len(SEEDS)]
    for line in whole:
        cells = [str(line["batch"]), line["arm"], f"{line['lr']:g}", str(line["seeds"])]
        lines.append("| " + " | ".join([*cells, *(figure(line, key) for key in ["test_accuracy", *vendors])]) + " |")
    if summary["margin"]:
        told = [
            f"batch {batch} {margin['points_above_live']:+.1f} "
            f"({margin['interval'][0]:+.1f} to {margin['interval'][1]:+.1f}; {margin['seeds']} seeds)"
            for batch, margin in summary["margin"].items()
        ]
        lines += [
            "",
            f"Points of {CHOSEN}, the arm fixed in advance, against live, seed by seed, with 95 % intervals: "
            f"{', '.join(told)}. Live was not recalibrated after training here.",
        ]
    missing = [b for b in sorted(BATCHES) if sum(line["batch"] == b for line in whole) < len(arms_at(b))]
    if missing:
        lines += [
            "",
            f"Not all seeds were run yet at batch {', '.join(map(str, missing))}; the JSON has the rows so far.",
        ]
    if summary["range"]:
        rates = list(summary["range"][0]["accuracy"])
        lines += ["", "| arm, batch 4 | " + " | ".join(rates) + " | within 3 points of its best |"]
        lines.append("|" + "---|" * (len(rates) + 2))
        for line in summary["range"]:
            values = " | ".join(f"{line['accuracy'][rate]:.1f}" for rate in rates)
            low, high = min(line["within"]), max(line["within"])
            # The range may go on behind the last rung that was run.
            good = f"{'≤ ' * (low == RANGE_RUNGS[0])}{low:g} to {'≥ ' * (high == RANGE_RUNGS[-1])}{high:g}"
            lines.append(f"| {line['arm']} | {values} | {good} |")
    if summary["robust"]:
        robust = summary["robust"]
        told = {arm: f"{low:g} to {high:g}" for arm, (low, high) in robust["tolerated"].items()}
        lines += [
            "",
            "limited is affine none with the steps of the optimizer limited. Rates within "
            f"{robust['within']:g} points of an arm's best, of those from {RANGE_RUNGS[0]:g} to {RANGE_RUNGS[-1]:g}: "
            f"limited {told['limited']}, none {told['none']}.",
        ]
    return "\n".join(lines) + "\n"


def plot(summary: dict[str, Any], path: Path) -> None:
    """Draw accuracy by batch size, and by learning rate at batch 4."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, arm in enumerate(ARMS):
        style = {"color": f"C{i}", "marker": "o", "label": arm, "linestyle": "--" if arm == "live" else "-"}
        lines = [line for line in summary["table"] if line["arm"] == arm]
        spread = [line["test_accuracy sd"] or 0.0 for line in lines]
        left.errorbar(
            [x["batch"] * 1.03 ** (i - 2) for x in lines],
            [x["test_accuracy"] for x in lines],
            spread,
            capsize=2,
            **style,
        )
        for line in summary["range"]:
            if line["arm"] == arm:
                right.plot([float(lr) for lr in line["accuracy"]], list(line["accuracy"].values()), **style)
    left.set(xscale="log", xlabel="batch size", ylabel="accuracy on unseen emoji, %", title="each arm at its best rate")
    left.set_xticks(sorted(BATCHES), [str(b) for b in sorted(BATCHES)])
    left.minorticks_off()
    right.set(xscale="log", xlabel="learning rate (AdamW)", title="batch 4, by learning rate")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.legend(title="BatchNorm")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run the study, or only write its tables anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--report-only", action="store_true", help="write table and plot from the rows there are")
    args = parser.parse_args()
    path = ROOT / "results" / "study_small_batch.json"
    store = Store(path, "python scripts/study_small_batch.py", SEEDS, device="cpu")
    if not args.report_only:
        cells.run(store, next_cells, fine_tune, args.workers, "test_accuracy")
    summary = summarize(store)
    store.finish(summary)
    write_atomically(path.with_suffix(".md"), markdown(summary))
    plot(summary, path.with_suffix(".png"))
    print(markdown(summary))


if __name__ == "__main__":
    main()
