"""A stream of images from several domains, at test time, and nobody says which image is from which.

The networks, domains and mixtures of study_shift.py: EfficientNet-Lite0 fine-tuned on the emoji of one vendor, tested
on a mixture of three vendors, or of the vendor's own drawings under five corruptions. Arms: the source's statistics;
one recalibration on 1,024 unlabeled images of the mixture; a `StatisticsBank` filled from the same images by domain,
and then told the domain of each test image, or choosing the nearest for each image by itself (`nearest_each`), or for
16 images in a row of one domain (`nearest`). Accuracy, and how often the chosen domain was the right one. Three seeds,
of which the results say how many were run so far; the source networks are those that study_shift.py keeps in runs/.

Hardware: 2 CPU cores: 10 minutes. Resumes where it was cut off. Result: results/study_stream.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from store import Store, write_atomically
from study_shift import SEEDS, hits, images, make_source, percent, recalibrated, source
from study_shift_report import MIXED_IMAGES, MIXTURES, Results, name, table
from torch import Tensor, nn

from finetune_bn.recalibration.bank import StatisticsBank

ROOT = Path(__file__).resolve().parent.parent
ARMS = {
    "source": "source",
    "pooled": "one recalibration",
    "told": "a bank, told the domain",
    "each": "nearest, image by image",
    "row": "nearest, 16 in a row",
}
IN_A_ROW = 16

Key = dict[str, Any]


def keys(seed: int, mixture: str) -> list[Key]:
    """Return what is measured for a mixture, one key a domain and arm."""
    return [
        {"part": "stream", "mixture": mixture, "seed": seed, "shift": shift, "severity": severity, "arm": arm}
        for shift, severity in MIXTURES[mixture]
        for arm in ARMS
    ]


@torch.inference_mode()
def correct(net: nn.Module, bank: StatisticsBank, x: Tensor, y: Tensor, names: list[str]) -> Tensor:
    """Return 1 for each image that is classified correctly by the statistics that were chosen for it, else 0."""
    found = torch.zeros(len(y), dtype=torch.float64)
    for domain in sorted(set(names)):
        rows = torch.tensor([i for i, chosen in enumerate(names) if chosen == domain])
        with bank.using(domain, net):
            found[rows] = hits(net, x[rows], y[rows])
    return found


def chosen(net: nn.Module, bank: StatisticsBank, x: Tensor, arm: str) -> list[str]:
    """Return the domain that the bank chooses for each image, by itself or with those beside it."""
    if arm == "each":
        return [domain for part in x.split(64) for domain in bank.nearest_each(net, part)]
    return [domain for part in x.split(IN_A_ROW) for domain in [bank.nearest(net, part)] * len(part)]


def measure(seed: int, mixture: str) -> Iterator[Key]:
    """Yield the rows of a mixture."""
    domains, net = MIXTURES[mixture], copy.deepcopy(source(seed))
    share = MIXED_IMAGES // len(domains)
    # No emoji is in the share of two domains: a mixture shows each in one drawing.
    parts = [images(seed, "train", *domain)[0][i * share :][:share] for i, domain in enumerate(domains)]
    together = torch.cat(parts)
    order = torch.randperm(len(together), generator=torch.Generator().manual_seed(seed))
    pooled, _ = recalibrated(net, together[order])
    bank = StatisticsBank()
    for domain, part in zip(domains, parts, strict=True):
        bank.keep(str(domain), recalibrated(net, part)[0])
    for key in keys(seed, mixture):
        domain, arm = (key["shift"], key["severity"]), key["arm"]
        x, y = images(seed, "test", *domain)
        if arm in ("source", "pooled"):
            yield key | {"accuracy": percent(hits(net if arm == "source" else pooled, x, y))}
            continue
        names = [str(domain)] * len(y) if arm == "told" else chosen(net, bank, x, arm)
        right = 100 * sum(one == str(domain) for one in names) / len(names)
        yield key | {"accuracy": percent(correct(net, bank, x, y, names)), "right": round(right, 4)}


def seeds(store: Store, mixture: str) -> str:
    """Return how many seeds have all cells of a mixture."""
    whole = sum(all(store.done(key) for key in keys(seed, mixture)) for seed in SEEDS)
    return f"{whole} seed{'s' * (whole != 1)}"


def write_report(store: Store) -> str:
    """Write the table, and return it."""
    results = Results(store.rows)
    lines, notes, summary = [], [], {}
    for mixture, domains in MIXTURES.items():
        for label, these in [*((name(d), [d]) for d in domains), ("**all**", domains)]:
            cells = [
                results.spread(lambda seed, m=mixture, a=arm, d=these: results.mean(seed, d, mixture=m, arm=a)).text()
                for arm in ARMS
            ]
            lines.append([mixture, label, *cells])
        gains = {
            arm: results.above(domains, {"mixture": mixture, "arm": arm}, {"mixture": mixture, "arm": "source"})
            for arm in ARMS
        }
        right = {
            arm: [
                row["right"]
                for row in store.rows
                if row["mixture"] == mixture and row["arm"] == arm and row["seed"] in SEEDS
            ]
            for arm in ("each", "row")
        }
        shares = {arm: sum(found) / len(found) for arm, found in right.items() if found}
        summary[mixture] = {"gain": {arm: gain.data() for arm, gain in gains.items()}, "right": shares}
        notes.append(
            f"Points above the source's statistics, {mixture}, {seeds(store, mixture)}: "
            + ", ".join(f"{ARMS[arm]} {gains[arm].text('+.1f')}" for arm in ARMS if arm != "source")
            + f". The right domain is chosen for {shares['each']:.1f} % of single images, and for {shares['row']:.1f} "
            f"% of {IN_A_ROW} in a row."
        )
    text = table(["mixture", "domain", *ARMS.values()], lines, notes)
    write_atomically(ROOT / "results" / "study_stream.md", text)
    store.finish(summary)
    return text


def main() -> None:
    """Run the study, or only write its table anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report-only", action="store_true", help="write the table from the rows there are")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(ROOT / "results" / "study_stream.json", "python scripts/study_stream.py", SEEDS, device="cpu")
    for mixture, seed in () if args.report_only else itertools.product(MIXTURES, SEEDS):
        digest = make_source(seed)
        if all(store.done(key | {"source": digest}) for key in keys(seed, mixture)):
            continue
        for key in keys(seed, mixture):
            store.drop(key)
        for row in measure(seed, mixture):
            store.add(row | {"source": digest})
        print(f"{mixture}, seed {seed}: done", flush=True)
    print(write_report(store))


if __name__ == "__main__":
    main()
