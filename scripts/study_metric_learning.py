"""Metric learning: what to do with BatchNorm where batches are P labels x K images, each arm at its own best rate.

EfficientNet-Lite0 with its ImageNet weights, embeddings of 128 numbers, 300 steps of 32 emoji of 64 pixels, AdamW,
warm-up and cosine. The label is the emoji, the domain the vendor that drew it; Recall@1 is the mean over pairs of
vendors of images of one looked up among those of another, for emoji that were not trained on. Rows: NT-Xent at 16 x 2,
8 x 4 and 4 x 8 (an emoji has three images: a fourth is one of them, augmented anew), and proxy anchor at 16 x 2 and at
images drawn one by one, where a loss on pairs would find none. The learning rate is chosen once per row and arm, by
Recall@1 of validation emoji at seed 0, from one ladder: three rungs, and on while the best one is at an edge. Three
seeds; a seed sets the split, the head, and the order and augmentation of images, and is the same for all arms.

Hardware: 2 CPU cores, about three hours. Resumes where it was cut off. Result: results/study_metric_learning.*.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import cells
import torch
import torch.nn.functional as F
from store import Store
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.optim.step_limit import limit_steps
from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
BATCH, STEPS, DIMENSION = 32, 300, 128
SEEDS = (0, 1, 2)
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
FIRST_RUNGS = (1e-4, 3e-4, 1e-3)
RECALIBRATE_ON = 512  # images


@dataclass(frozen=True)
class Arm:
    """What is done to BatchNorm.

    Attributes:
        title: for the table.
        policy: how it is trained.
        recalibrate_first: whether the statistics are those of i.i.d. training images before it is converted.
        limited: whether the steps of the optimizer are limited.
        trained_as: another arm of which this is the same training, evaluated with recalibrated statistics.
    """

    title: str
    policy: fbn.Policy
    recalibrate_first: bool = False
    limited: bool = False
    trained_as: str = ""


ARMS = {
    "live": Arm("live", fbn.Keep()),
    "live_recalibrated": Arm("live, recalibrated after training", fbn.Keep(), trained_as="live"),
    "none": Arm("frozen, affine none", fbn.Freeze("none")),
    "limited": Arm("frozen, affine none, steps limited", fbn.Freeze("none"), limited=True),
    "renorm_inf": Arm("renorm, r = d = inf, statistics fixed", fbn.Renorm(math.inf, math.inf, momentum=0.0)),
    "merged": Arm("frozen, affine merged", fbn.Freeze("merged")),
    "ghost": Arm("ghost x[i::K]", fbn.Ghost(2)),
    "original": Arm("frozen, affine original", fbn.Freeze("original")),
    "recalibrated": Arm("recalibrated, then frozen", fbn.Freeze("none"), recalibrate_first=True),
    "noise": Arm("frozen, noise of 32 images", fbn.Freeze("none", noise=32)),
    "renorm": Arm("renorm, default limits", fbn.Renorm()),
    "stochastic": Arm("stochastic norm", fbn.Stochastic()),
}
MAIN = ("live", "live_recalibrated", "none", "limited")
# (loss, images of a label in a batch, arms), in the order of importance: a run that is cut off has the first ones.
BLOCKS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("ntxent", 2, MAIN),
    ("ntxent", 2, ("renorm_inf", "ghost")),
    ("ntxent", 4, MAIN),
    ("proxy_anchor", 1, MAIN),
    ("proxy_anchor", 2, MAIN),
    ("ntxent", 2, tuple(ARMS)),
    ("ntxent", 8, MAIN),
)
ROWS = tuple(dict.fromkeys((loss, k) for loss, k, _ in BLOCKS))


def title_of(loss: str, k: int) -> str:
    """Return how a row of the study is called."""
    batches = "i.i.d." if k == 1 else f"{BATCH // k} x {k}"
    return f"{ {'ntxent': 'NT-Xent', 'proxy_anchor': 'proxy anchor'}[loss] }, {batches}"


@cache
def images(seed: int, k: int) -> Any:
    """Return the data module of a seed, ready for use, with K images of a label in a training batch."""
    from finetune_bn.data import EmojiData

    data = EmojiData(
        target="identity", batch_size=BATCH, images_per_label=k if k > 1 else None, drop_last=True, seed=seed,
        augment="light", mean=(0.5,) * 3, std=(0.5,) * 3, num_workers=0,
    )  # fmt: skip
    data.setup()
    return data


def network(arm: Arm, k: int, data: Any) -> nn.Module:
    """Return the pretrained network with an embedding head, its BatchNorm layers treated as the arm says."""
    from finetune_bn.backbones.create import create_backbone

    net = create_backbone("tf_efficientnet_lite0", "package", num_classes=DIMENSION)
    net = net.to(memory_format=torch.channels_last)
    if arm.recalibrate_first:
        recalibrate(net, data)
    policy = fbn.Ghost(max(k, 2)) if isinstance(arm.policy, fbn.Ghost) else arm.policy
    return fbn.convert(net, policy, verify=False)


def recalibrate(net: nn.Module, data: Any) -> None:
    """Give BatchNorm the statistics of training images that are drawn one by one."""
    drawn = (prepared(x) for x, _ in data.iid_dataloader("train", BATCH))
    fbn.recalibrate(net, drawn, max_samples=RECALIBRATE_ON, progress=False)


def prepared(x: Tensor) -> Tensor:
    """Return images in the memory format that is fast here."""
    return x.contiguous(memory_format=torch.channels_last)


def new_loss(name: str, num_labels: int) -> nn.Module:
    """Return a loss of pytorch-metric-learning."""
    from pytorch_metric_learning import losses

    if name == "ntxent":
        return losses.NTXentLoss(temperature=0.1)
    return losses.ProxyAnchorLoss(num_labels, DIMENSION)


def fine_tune(loss: str, k: int, arm: str, lr: float, seed: int) -> dict[str, Any]:
    """Train one cell and return its figures, with the statistics as they are and, of live ones, recalibrated."""
    data = images(seed, k)
    torch.manual_seed(seed)
    net = network(ARMS[arm], k, data)
    criterion = new_loss(loss, data.num_train_classes)
    proxies = {"params": list(criterion.parameters()), "lr": 100 * lr, "weight_decay": 0.0}
    optimizer, schedule = cells.adamw(net, lr, STEPS, [proxies] if proxies["params"] else [])
    if ARMS[arm].limited:
        limit_steps(optimizer, net)
    started = time.perf_counter()
    net.train()
    total = torch.zeros(())
    for x, y in batches(data.train_dataloader()):
        value = criterion(F.normalize(net(prepared(x))), y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        total += value.detach()
    figures = {"seconds": time.perf_counter() - started, "train_loss": total.item() / STEPS}
    figures |= scores(net, data)
    if isinstance(ARMS[arm].policy, fbn.Keep):
        recalibrate(net, data)
        figures |= {f"{name}/recalibrated": value for name, value in scores(net, data).items()}
    return figures


def batches(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the training batches, epoch after epoch."""
    done = 0
    while True:
        for x, y in loader:
            if done == STEPS:
                return
            done += 1
            yield x, y


@torch.inference_mode()
def scores(net: nn.Module, data: Any, parts: tuple[str, ...] = ("val", "test")) -> dict[str, float]:
    """Return Recall@1 across vendors and MAP@R among all, in percent; of test images also each pair of vendors."""
    from finetune_bn.metric_learning.retrieval import retrieval_report

    net.eval()
    found = {}
    for part in parts:
        loaders = data.val_dataloader() if part == "val" else data.test_dataloader()
        rows = [(net(prepared(x)), y, torch.full_like(y, i)) for i, loader in enumerate(loaders) for x, y in loader]
        embeddings, labels, domains = (torch.cat(column) for column in zip(*rows, strict=True))
        # A net that diverged finds nothing.
        embeddings = F.normalize(embeddings.nan_to_num(0.0, 0.0, 0.0))
        report = retrieval_report(embeddings, labels, domains, data.domains)
        found |= {f"{part}_recall_at_1": 100 * report.across["recall_at_1"]}
        found |= {f"{part}_map_at_r": 100 * report.overall.map_at_r}
        if part == "test":
            by_pair = {f"{a}_to_{b}": 100 * one.recall_at_1 for (a, b), one in report.pairs.items() if a != b}
            found |= {f"test_recall_at_1/{pair}": value for pair, value in by_pair.items()}
    return found


def untrained(seed: int) -> dict[str, Any]:
    """Return the scores of the pretrained network's own features."""
    from finetune_bn.backbones.create import create_backbone

    started = time.perf_counter()
    net = create_backbone("tf_efficientnet_lite0", "package", num_classes=0).to(memory_format=torch.channels_last)
    return {"seconds": time.perf_counter() - started} | scores(net, images(seed, 2), ("test",))


def measure(loss: str, k: int, arm: str, lr: float, seed: int) -> dict[str, Any]:
    """Measure one cell."""
    return untrained(seed) if arm == "untrained" else fine_tune(loss, k, arm, lr, seed)


def cell(loss: str, k: int, arm: str, lr: float, seed: int) -> dict[str, Any]:
    """Return the key of a cell; arms that share a training share the cell."""
    arm = arm if arm == "untrained" else ARMS[arm].trained_as or arm
    return {"loss": loss, "k": k, "arm": arm, "lr": lr, "seed": seed}


def suffix(arm: str) -> str:
    """Return what is behind the names of an arm's figures in the row of its training."""
    return "/recalibrated" if ARMS[arm].trained_as else ""


def next_cells(store: Store) -> Iterator[dict[str, Any]]:
    """Yield the cells that can be measured now, most important first; more appear as results come in."""
    baseline = (cell("none", 0, "untrained", 0.0, seed) for seed in SEEDS)
    yield from (key for key in baseline if not store.done(key))
    for loss, k, arms in BLOCKS:
        for arm in arms:
            for lr in cells.rates_to_try(tried_rates(store, loss, k, arm), LADDER, FIRST_RUNGS):
                yield cell(loss, k, arm, lr, 0)
        for seed in SEEDS[1:]:
            for arm in arms:
                lr = chosen(store, loss, k, arm)
                if lr is not None and not store.done(cell(loss, k, arm, lr, seed)):
                    yield cell(loss, k, arm, lr, seed)


def tried_rates(store: Store, loss: str, k: int, arm: str) -> dict[float, float]:
    """Return Recall@1 of validation emoji at seed 0 by learning rate."""
    found = {lr: store.find(**cell(loss, k, arm, lr, 0)) for lr in LADDER}
    return {lr: row[f"val_recall_at_1{suffix(arm)}"] for lr, row in found.items() if row}


def chosen(store: Store, loss: str, k: int, arm: str) -> float | None:
    """Return an arm's learning rate once it is known."""
    return cells.chosen_rate(tried_rates(store, loss, k, arm), LADDER, FIRST_RUNGS)


def summarize(store: Store) -> dict[str, Any]:
    """Return the figures that the README quotes, and what follows from them."""
    table = []
    for loss, k in ROWS:
        arms = dict.fromkeys(arm for row_loss, row_k, arms in BLOCKS if (row_loss, row_k) == (loss, k) for arm in arms)
        lines = [line for arm in arms if (line := one_line(store, loss, k, arm))]
        live = next((line["values"] for line in lines if line["arm"] == "live"), None)
        for line in lines:
            line["against_live"] = spread([a - b for a, b in zip(line["values"], live, strict=True)]) if live else None
        table += lines
    start = [row["test_recall_at_1"] for seed in SEEDS if (row := store.find(arm="untrained", seed=seed))]
    return {"untrained": spread(start), "table": table, "best_or_within_one_spread": near_best(table)}


def one_line(store: Store, loss: str, k: int, arm: str) -> dict[str, Any] | None:
    """Return an arm's figures in a row of the study, once all seeds were run at its learning rate."""
    lr = chosen(store, loss, k, arm)
    rows = [] if lr is None else [row for seed in SEEDS if (row := store.find(**cell(loss, k, arm, lr, seed)))]
    if len(rows) < len(SEEDS):
        return None
    values = [row[f"test_recall_at_1{suffix(arm)}"] for row in rows]
    return {
        "loss": loss, "k": k, "arm": arm, "lr": lr, "values": values, "recall_at_1": spread(values),
        "map_at_r": spread([row[f"test_map_at_r{suffix(arm)}"] for row in rows]),
    }  # fmt: skip


def spread(values: list[float]) -> list[float]:
    """Return mean and standard deviation."""
    return [fmean(values), stdev(values)]


def near_best(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each row with more than live arms, the arms that are the best or within one spread of the best."""
    rows: dict[tuple[str, int], dict[str, list[float]]] = {}
    for line in table:
        rows.setdefault((line["loss"], line["k"]), {})[line["arm"]] = line["recall_at_1"]
    good = {
        row: {arm for arm, (mean, _) in arms.items() if mean >= top[0] - top[1]}
        for row, arms in rows.items()
        if not arms.keys() <= {"live", "live_recalibrated"} and (top := max(arms.values()))
    }
    return [{"loss": loss, "k": k, "arms": sorted(arms)} for (loss, k), arms in good.items()]


def markdown(summary: dict[str, Any]) -> str:
    """Return the summary as a table, with what follows from it."""

    def figure(pair: list[float] | None, sign: str = "") -> str:
        return "" if pair is None else f"{pair[0]:{sign}.1f} ± {pair[1]:.1f}"

    lines = [
        "| loss, batches | BatchNorm | learning rate | Recall@1 | against live | MAP@R |",
        "|---|---|---|---|---|---|",
    ]
    lines.append(f"| | pretrained features, no training | | {figure(summary['untrained'])} | | |")
    good = {(row["loss"], row["k"], arm) for row in summary["best_or_within_one_spread"] for arm in row["arms"]}
    for line in summary["table"]:
        recall = figure(line["recall_at_1"])
        recall = f"**{recall}**" if (line["loss"], line["k"], line["arm"]) in good else recall
        change = "" if line["arm"] == "live" else figure(line["against_live"], "+")
        what = f"{title_of(line['loss'], line['k'])} | {ARMS[line['arm']].title}"
        lines.append(f"| {what} | {line['lr']:g} | {recall} | {change} | {figure(line['map_at_r'])} |")
    if good:
        lines += ["", "Bold: the best of a row, and what is within one spread of it.", *verdict(summary)]
    missing = [title_of(*row) for row in ROWS if row not in {(line["loss"], line["k"]) for line in summary["table"]}]
    if missing:
        lines += ["", f"Not run to the end yet: {'; '.join(missing)}. The JSON has the cells so far."]
    return "\n".join(lines) + "\n"


def verdict(summary: dict[str, Any]) -> list[str]:
    """Return in words what the two frozen arms that are in every row gain on live, and by how much they differ.

    The arms are fixed in advance: the best one of a row would be chosen on the images that it is compared on.
    """
    lines = []
    values = {(line["loss"], line["k"], line["arm"]): line["values"] for line in summary["table"]}
    for better, worse in (("none", "live"), ("limited", "none")):
        told = []
        for loss, k in ROWS:
            one, two = (values.get((loss, k, arm)) for arm in (better, worse))
            if one and two:
                points, low, high = cells.interval([a - b for a, b in zip(one, two, strict=True)])
                told.append(f"{title_of(loss, k)} {points:+.1f} ({low:+.1f} to {high:+.1f})")
        if told:
            names = f"{ARMS[better].title}, against {ARMS[worse].title}"
            lines += ["", f"Points of Recall@1 of {names}, with 95 % intervals: {'; '.join(told)}."]
    return lines


def plot(store: Store, path: Path) -> None:
    """Draw Recall@1 by learning rate at seed 0, the rates that the search tried, a panel for each row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(loss, k) for loss, k in ROWS if any((r["loss"], r["k"]) == (loss, k) for r in store.rows)]
    figure, panels = plt.subplots(
        1, len(rows), figsize=(1 + 4.2 * len(rows), 5.0), sharey=True, layout="constrained", squeeze=False
    )
    for panel, (loss, k) in zip(panels[0], rows, strict=True):
        for i, (arm, about) in enumerate(ARMS.items()):
            tried = {lr: store.find(**cell(loss, k, arm, lr, 0)) for lr in LADDER}
            points = [(lr, row[f"test_recall_at_1{suffix(arm)}"]) for lr, row in tried.items() if row]
            if points:
                style = "--" if arm.startswith("live") else "-"
                panel.plot(
                    *zip(*points, strict=True), style, color=f"C{i % 10}", marker="os"[i // 10], label=about.title
                )
        untrained = [row["test_recall_at_1"] for row in store.rows if row["arm"] == "untrained" and row["seed"] == 0]
        panel.axhline(*untrained[:1], color="gray", lw=1, ls=":", label="no training")
        panel.set(xscale="log", xlabel="learning rate (AdamW)", title=title_of(loss, k))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("Recall@1 across vendors, unseen emoji, seed 0, %")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run the study, or only write its tables anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--report-only", action="store_true", help="write table and plot from the rows there are")
    args = parser.parse_args()
    path = ROOT / "results" / "study_metric_learning.json"
    store = Store(path, "python scripts/study_metric_learning.py", SEEDS, device="cpu")
    if not args.report_only:
        cells.run(store, next_cells, measure, args.workers, "test_recall_at_1")
    summary = summarize(store)
    store.finish(summary)
    write_atomically(path.with_suffix(".md"), markdown(summary))
    plot(store, path.with_suffix(".png"))
    print(markdown(summary))


if __name__ == "__main__":
    main()
