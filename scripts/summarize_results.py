"""The lines that the README opens with, from the results of the studies: results/summary.md.

Nothing is measured here. The frozen arm is affine none, which was fixed before the studies; differences are taken seed
by seed, with 95 % intervals. A difference whose interval holds 0, or that is smaller than what seeds and machines move
in this setting (2.5 points), is called undecided.

    python scripts/summarize_results.py            # then: python scripts/update_tables.py
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import cells

from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
CORRUPTIONS = ("noise 5", "blur 5", "contrast 5", "inversion 5", "color 5")


def summary(results: Path) -> str:
    """Return the table and the sentence behind it, as Markdown."""
    read = {
        name: json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["summary"]
        for name in ("study_small_batch", "study_pairs", "study_shift", "bench_saved_bytes")
    }
    lines = [
        "| measured | before | after | difference, 95 % interval | seeds |",
        "|---|---|---|---|---|",
        *small_batches(read["study_small_batch"]),
        *retrieval(read["study_pairs"]),
        corruptions(read["study_shift"]),
        "",
        memory(read["bench_saved_bytes"]),
    ]
    return "\n".join(lines) + "\n"


def row(what: str, before: float, after: float, points: float, low: float, high: float, seeds: int) -> str:
    """Return a row of the table; a difference that chance explains is marked."""
    difference = f"{points:+.1f} ({low:+.1f} to {high:+.1f})"
    difference += "" if cells.decided(points, low, high, seeds) else cells.why_undecided(seeds)
    return f"| {what} | {before:.1f} | {after:.1f} | {difference} | {seeds} |"


def small_batches(study: dict[str, Any]) -> list[str]:
    """Return the best fair live arm against frozen, for each network and batch size."""
    rows = []
    for one in study["margin"]:
        if one["kind"] in ("best", "long live"):
            what = f"accuracy, {one['family']}, batch {one['batch']}: {one['other']}; frozen"
            figures = (one[key] for key in ("before", "after", "points", "low", "high"))
            rows.append(row(what, *figures, seeds=one["seeds"]))
    return rows


def retrieval(study: dict[str, Any]) -> list[str]:
    """Return the best live arm against frozen for NT-Xent with batches of 16 labels x 2 images, for each network."""
    rows = []
    for one in study["margin"]:
        what = f"Recall@1, {one['family']}, 16 labels x 2 images: {one['other']}; frozen"
        what += ", 128 px" * ("128 px" in one["setting"]) + ", proxy anchor" * ("proxies" in one["setting"])
        figures = (one[key] for key in ("before", "after", "points", "low", "high"))
        rows.append(row(what, *figures, seeds=one["seeds"]))
    return rows


def corruptions(study: dict[str, Any]) -> str:
    """Return the source's statistics against those of 512 unlabeled images, over five corruptions."""
    shifts = study["by_shift"]
    before, after = (fmean(shifts[name][key]["mean"] for name in CORRUPTIONS) for key in ("source", "n 512"))
    gain = study["gain"]["corruptions, severity 5"]["n 512, prior 0"]
    half = cells.STUDENT_T[gain["seeds"] - 2] * gain["sd"] / math.sqrt(gain["seeds"])
    mean = gain["mean"]
    what = "accuracy, five corruptions: as trained, recalibrated on 512 images"
    return row(what, before, after, mean, mean - half, mean + half, gain["seeds"])


def memory(bench: dict[str, Any]) -> str:
    """Return in words what a training step of ResNet-50 keeps for backward."""
    kept = {name: found["fp32"]["mib_per_image"] for name, found in bench["resnet50"].items()}
    live, frozen, folded = (
        kept[name] for name in ("live BatchNorm", "ours, affine=none", "ours, affine=original, fold=always")
    )
    return (
        f"For backward ResNet-50 keeps {live:.1f} MiB an image with live layers (224 px, float32), {frozen:.1f} MiB "
        f"with frozen ones, {folded:.1f} MiB where their scale is learned and folded; a count, the same in every run."
    )


def main() -> None:
    """Write the summary, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where it is out of date")
    path = ROOT / "results" / "summary.md"
    text = summary(ROOT / "results")
    if parser.parse_args().check:
        late = text != path.read_text(encoding="utf-8")
        sys.exit(f"{path.name} is out of date; run: python scripts/summarize_results.py" if late else 0)
    write_atomically(path, text)
    print(text)


if __name__ == "__main__":
    main()
