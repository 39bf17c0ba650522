"""Which treatment, and can it be told in advance? Eight arms in 24 settings, and the regret of following advice.

A setting is a network with ImageNet weights (EfficientNet-Lite0, MobileNetV2), a batch size, a number of training
images, a kind of pictures and a way to draw batches; `SETTINGS` lists them. Images drawn one by one are classified
(9 categories of emoji, 10 digits; cross-entropy, accuracy); batches of 16 emoji x 2 vendors are embedded (NT-Xent,
128 numbers, Recall@1 across vendors, of emoji that were not trained on). All images have 64 pixels.

Every arm of a setting gets the same number of steps, the same ladder of learning rates with a search that goes on
while the best rate is at an edge, AdamW, warm-up and cosine. The rate is chosen by validation images with seed 100,
which reports nothing; seeds 0 to 4 report, on test images. A seed sets the split, the head and the order, for all
arms alike. `live` and `recalibrated` are one training, evaluated twice.

Hardware: 2 CPU cores, about 6 hours. Resumes where it was cut off. Result: results/study_advice.{json,md}.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arms
import cells
import study_advice_report
import torch
from advice_arms import ARMS, BY_NAME, REPORT, SETTINGS, chosen_rate, train_arm, tried
from compact import CHOOSE, FIRST_RUNGS, LADDER, missing
from store import Store

ROOT = Path(__file__).resolve().parent.parent


def measure(setting: str, arm: str, lr: float, seed: int) -> dict[str, Any]:
    """Train one cell and return its figures; of `live` those of `recalibrated` too."""
    return train_arm(BY_NAME[setting], arm, lr, seed)


def next_cells(store: Store) -> Iterator[dict[str, Any]]:
    """Yield the cells that can be measured now, most important first: three seeds in all settings, then two more."""
    for seeds in (REPORT[:3], REPORT):
        for setting in (s for s in SETTINGS if missing(s) is None):
            for arm in ARMS:
                trained = arms.trained_as(arm)
                rates = cells.rates_to_try(tried(store, setting.name, arm), LADDER, FIRST_RUNGS)
                wanted = [(lr, CHOOSE) for lr in rates]
                lr = chosen_rate(store, setting.name, arm)
                wanted += [(lr, seed) for seed in seeds if lr is not None]
                for rate, seed in wanted:
                    cell = {"setting": setting.name, "arm": trained, "lr": rate, "seed": seed}
                    if not store.done(cell):
                        yield cell


def main() -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    parser.add_argument("--report-only", action="store_true", help="measure nothing, only write the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(args.out / "study_advice.json", "python scripts/study_advice.py", (CHOOSE, *REPORT), "cpu")
    if not args.report_only:
        plan = [arms.Arm(setting, arm, REPORT) for setting in SETTINGS for arm in ARMS]
        arms.adopt(store, arms.shared([args.out / "study_small_batch.json"], plan))
        cells.run(store, next_cells, measure, args.workers, "val")
    study_advice_report.write(store, args.out)


if __name__ == "__main__":
    main()
