"""Shifted data in two families of networks: what statistics of unlabeled target images bring.

By the protocol of scripts/compact.py: EfficientNet-Lite0 and MobileNetV2, BatchNorm frozen, are fine-tuned on 400 emoji
of two vendors in batches of 16, at the learning rate that scripts/study_advice.py chose there by a seed that reports
nothing. Then the layers get the statistics of the training images with the function preserved, and after that those of
n images of the target, drawn from emoji that are not tested on, with the former as a prior worth N images. Accuracy on
test images of the same vendors, of another vendor, and under five corruptions at severity 5 (corruptions.py). Seeds 0,
1 and 2; a seed sets the split, the head and all orders. scripts/study_shift.py has one network and more arms.

Hardware: 2 CPU cores, ten minutes. Resumes where it was cut off. Result: results/study_shift_families.{json,md}.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import advice_pictures
import arms
import cells
import torch
from arms import Arm
from compact import FAMILIES, Objective, Setting, missing, normalizes_by, pictures, train, untrained
from corruptions import STRENGTHS, corrupt
from store import Store
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
SEEDS, SIZES, PRIORS = (0, 1, 2), (8, 32, 512), (0, 128)
SETTINGS = {family: Setting(family, 16, 400, "same") for family in FAMILIES}
SHIFTS = ("none", "other vendor", *STRENGTHS)
GROUPS = {"none": ("none",), "the other vendor": ("other vendor",), "corruptions, severity 5": tuple(STRENGTHS)}


def images(family: str, seed: int, shift: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return unlabeled images of the target, which nothing was trained on, and test images with their labels."""
    of_vendors = "other" if shift == "other vendor" else "same"
    (x, _), _, (test, labels) = advice_pictures.emoji(of_vendors, 400 + max(SIZES), seed, pairs=False)
    target = x[400:]
    if shift == "other vendor":
        target = advice_pictures.unseen(seed)[: max(SIZES)]
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in normalizes_by(family))
    found = []
    for pixels in (target, test):
        values = pixels.float() / 255
        values = corrupt(values, shift, 5, list(range(len(values)))) if shift in STRENGTHS else values
        found.append(((values - mean) / std).contiguous(memory_format=torch.channels_last))
    return found[0], found[1], labels


@torch.inference_mode()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images that are classified correctly, in percent."""
    outputs = torch.cat([net(part) for part in x.split(128)])
    return 100 * (outputs.argmax(1) == y).double().mean().item()


def measure(rates: dict[str, float], family: str, seed: int) -> dict[str, Any]:
    """Train the network of a family and seed, and return its accuracy by shift, size and prior."""
    started, setting = time.perf_counter(), SETTINGS[family]
    net = fbn.convert(untrained(setting, seed), fbn.Freeze("none"), verify=False)
    optimizer, schedule = cells.adamw(net, rates[family], setting.steps)
    net, _ = train(net, optimizer, schedule, setting, seed, Objective(setting, seed))
    net.eval()
    fbn.recalibrate(net, pictures(setting, seed).train.split(64), how="preserve", progress=False)
    found = {}
    for shift in SHIFTS:
        target, x, y = images(family, seed, shift)
        figures = {"source": accuracy(net, x, y)}
        for n in SIZES:
            for prior in PRIORS:
                adapted = copy.deepcopy(net)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of few images, which is what is asked here
                    fbn.recalibrate(adapted, target[:n].split(64), prior=prior, progress=False)
                figures[f"n {n}, prior {prior}"] = accuracy(adapted, x, y)
        found[shift] = figures
    return {"by_shift": found, "source": found["none"]["source"], "seconds": time.perf_counter() - started}


def next_cells(store: Store) -> Iterator[dict[str, Any]]:
    """Yield the cells that are not measured yet."""
    for seed in SEEDS:
        for family, setting in SETTINGS.items():
            cell = {"family": family, "seed": seed}
            if missing(setting) is None and not store.done(cell):
                yield cell


def summarize(store: Store) -> list[dict[str, Any]]:
    """Return a line for each family and group of shifts: accuracy, and what recalibration brings, seed by seed."""
    lines = []
    for family in FAMILIES:
        rows = [row["by_shift"] for row in store.rows if row["family"] == family]
        for group, shifts in GROUPS.items() if len(rows) > 1 else ():
            line: dict[str, Any] = {"family": family, "shift": group, "seeds": len(rows), "gains": {}}
            line["source"] = fmean(row[shift]["source"] for row in rows for shift in shifts)
            for key in (f"n {n}, prior {prior}" for n in SIZES for prior in PRIORS):
                gains = [fmean(row[shift][key] - row[shift]["source"] for shift in shifts) for row in rows]
                line["gains"][key] = cells.gain(gains)
            lines.append(line)
    return lines


def markdown(lines: list[dict[str, Any]]) -> str:
    """Return the table."""
    keys = [f"n {n}, prior {prior}" for n in SIZES for prior in PRIORS]
    head = ["network", "shift", "as trained", *keys, "seeds"]
    return arms.table(
        head,
        [
            [one["family"], one["shift"], f"{one['source']:.1f}"]
            + [arms.difference(one["gains"][key]) for key in keys]
            + [one["seeds"]]
            for one in lines
        ],
    )


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    parser.add_argument("--report-only", action="store_true", help="write the table from the rows there are")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(args.out / "study_shift_families.json", "python scripts/study_shift_families.py", SEEDS, "cpu")
    if not args.report_only:
        advised = Store(args.out / "study_advice.json", "", device="cpu").rows
        rates = {family: Arm(setting, "none").rate(advised) for family, setting in SETTINGS.items()}
        unknown = [family for family, lr in rates.items() if lr is None]
        if unknown:
            parser.error(
                f"no learning rate is chosen for {', '.join(unknown)}; run first: python scripts/study_advice.py"
            )
        cells.run(store, next_cells, partial(measure, rates), args.workers, "source")
    lines = summarize(store)
    store.finish({"lines": lines})
    write_atomically(args.out / "study_shift_families.md", markdown(lines))
    print(markdown(lines))


if __name__ == "__main__":
    main()
