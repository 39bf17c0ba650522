"""Does `diagnose` tell P x K batches from i.i.d. ones, and how long does it take? EfficientNet-Lite0, embedded emoji.

At each of 20 seeds the same network looks at two loaders of 32 images of 64 pixels, the images drawn one by one and 16
emoji x 2 vendors, 320 images of each (512 at seeds 0 to 2). Flagged is a loader whose p-value (permutation test of
channel means, or of labels) is below 0.01; clean one of which `diagnose` says that it is i.i.d. One whole diagnosis of
1,000 images in batches of 16 is timed too, curvature, memory and launches included.

Hardware: CPU, one thread. Result: results/check_diagnose.{json,md}.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from store import Store

import finetune_bn as fbn
from finetune_bn.data import EmojiData
from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
SEEDS = tuple(range(20))
IMAGES = 320


def network(classes: int) -> torch.nn.Module:
    """Return the pretrained network with a new head."""
    torch.manual_seed(0)
    return fbn.create_backbone("tf_efficientnet_lite0", "package", num_classes=classes)


def loader(seed: int, **options: Any) -> Any:
    """Return the training loader of emoji, normalized as the weights ask."""
    half = (0.5, 0.5, 0.5)
    data = EmojiData(image_size=64, seed=seed, num_workers=0, mean=half, std=half, **options)
    data.setup("fit")
    return data.train_dataloader()


def look(sampler: str, seed: int) -> dict[str, Any]:
    """Return what a diagnosis says of the batches of one loader."""
    labels = {"images_per_label": 2} if sampler == "16 x 2" else {}
    batches = loader(seed, target="identity", batch_size=32, **labels)
    began = time.process_time()
    found = fbn.diagnose(
        network(128), batches, max_images=IMAGES, seconds=3600, curvature=False, memory=False, progress=False
    )
    kept = ("p_value", "label_p_value", "iid", "deff", "n_eff", "leakage", "train_eval_gap", "images_per_label")
    figures = {name: getattr(found.batches, name) for name in kept}
    return {"sampler": sampler, "seed": seed, **figures, "cpu_seconds": time.process_time() - began}


def timed() -> dict[str, Any]:
    """Return how long a whole diagnosis takes, in seconds of the CPU and of the clock."""
    net, batches = network(9), loader(0, target="category", train_size=1000, batch_size=16)
    began, clock = time.process_time(), time.perf_counter()
    found = fbn.diagnose(net, batches, optimizer="adamw", lr=1e-3, seconds=3600, progress=False)
    cpu, wall = time.process_time() - began, time.perf_counter() - clock
    return {
        "sampler": "timed",
        "seed": 0,
        "images": found.images,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "left_out": list(found.left_out),
        "shift": found.shift,
        "threads": torch.get_num_threads(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the counts as a Markdown table, and the time."""
    lines = ["| batches of 32 | seeds | p below 0.01 | said to be i.i.d. | DEFF | n_eff | leakage |"]
    lines.append("|---|---|---|---|---|---|---|")
    for sampler in ("16 x 2", "one by one"):
        of = [row for row in rows if row["sampler"] == sampler]
        flagged = sum(min(row["p_value"], row["label_p_value"]) < 0.01 for row in of)
        clean = sum(row["iid"] is True for row in of)
        figures = [f"{median(row[name] for row in of):.2f}" for name in ("deff", "n_eff", "leakage")]
        lines.append(f"| {' | '.join([sampler, str(len(of)), str(flagged), str(clean), *figures])} |")
    of = [row for row in rows if row["sampler"] == "timed"]
    if of:
        row = of[0]
        lines.append("")
        lines.append(
            f"A whole diagnosis of {row['images']} images takes {row['cpu_seconds']:.1f} seconds of one CPU core "
            f"({row['wall_seconds']:.0f} by the clock)."
        )
    return "\n".join(lines) + "\n"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures that the documentation quotes."""
    sorted_ones = [row for row in rows if row["sampler"] == "16 x 2"]
    single = [row for row in rows if row["sampler"] == "one by one"]
    whole = next(row for row in rows if row["sampler"] == "timed")
    return {
        "seeds": len(single),
        "flagged": sum(min(row["p_value"], row["label_p_value"]) < 0.01 for row in sorted_ones),
        "clean": sum(row["iid"] is True for row in single),
        "cpu_seconds": whole["cpu_seconds"],
    }


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(args.out / "check_diagnose.json", "python scripts/check_diagnose.py", SEEDS, "cpu")
    cells = [("timed", 0), *((sampler, seed) for seed in SEEDS for sampler in ("16 x 2", "one by one"))]
    for sampler, seed in cells:
        if not store.done({"sampler": sampler, "seed": seed}):
            store.add(timed() if sampler == "timed" else look(sampler, seed))
    store.finish(summary(store.rows))
    write_atomically(args.out / "check_diagnose.md", table(store.rows))


if __name__ == "__main__":
    main()
