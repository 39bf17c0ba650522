"""Bytes that a training step of ResNet-50 keeps for backward, by what was done to its BatchNorm layers.

Counted at 224 pixels with saved-tensor hooks: each storage once, parameters and buffers left out, float32 and bfloat16
autocast, beside the peers of `bench_step.py` and the same net without norm layers (the floor). Numbers of bytes do not
depend on the machine, and are linear in the batch: what two batches keep gives any other. Result:
results/bench_saved_bytes.{json,md}; minutes on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import track
from step_variants import EVAL, FLOOR, LIVE, TIMM, TORCHVISION, TUNE, VARIANTS, ours
from store import Store

from finetune_bn.files import write_atomically
from finetune_bn.layers.frozen import AFFINE_KINDS
from finetune_bn.memory import saved_bytes

ROOT = Path(__file__).resolve().parent.parent
SHOWN = [
    *(LIVE, EVAL, TUNE, TORCHVISION, TIMM),
    *(ours(affine, fold) for fold in ("never", "always", "auto") for affine in AFFINE_KINDS),
    FLOOR,
]
PRECISIONS = ("fp32", "bf16 autocast")
TO_FLOOR = (8, 32)


def measure(variant: str, precision: str, batch: int) -> dict[str, Any]:
    """Return the saved bytes of one cell."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 224, 224)
    model = VARIANTS[variant](timm.create_model("resnet50").train(), x)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast"):
            model(x)

    return {"variant": variant, "precision": precision, "batch": batch, "bytes": saved_bytes(model, step)}


def main() -> None:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs=2, default=(2, 4), help="the two batch sizes")
    low, high = parser.parse_args().batches
    path = ROOT / "results" / "bench_saved_bytes.json"
    store = Store(path, "python scripts/bench_saved_bytes.py", [0], device="cpu")
    cells = [(v, p, b) for v in SHOWN for p in PRECISIONS for b in (low, high)]
    for variant, precision, batch in track(cells, description="saved bytes"):
        if not store.done({"variant": variant, "precision": precision, "batch": batch}):
            store.add(measure(variant, precision, batch))

    def per_image(variant: str, precision: str) -> float:
        rows = [store.find(variant=variant, precision=precision, batch=b) for b in (low, high)]
        first, second = (row["bytes"] for row in rows if row)
        return float((second - first) / (high - low))

    def at(variant: str, precision: str, batch: int) -> float:
        row = store.find(variant=variant, precision=precision, batch=low)
        assert row is not None
        return float(row["bytes"] + (batch - low) * per_image(variant, precision))

    titles = ["MiB per image", "of live BN", *(f"to the floor, batch {batch}" for batch in TO_FLOOR)]
    header = [
        f"{precision}: {titles[0]}" if i == 0 else title for precision in PRECISIONS for i, title in enumerate(titles)
    ]
    lines = [f"| ResNet-50, 224 px | {' | '.join(header)} |", "|---" * (1 + len(header)) + "|"]
    summary: dict[str, Any] = {}
    for variant in SHOWN:
        summary[variant] = {}
        figures = []
        for precision in PRECISIONS:
            mib = per_image(variant, precision) / 2**20
            ratios = [per_image(variant, precision) / per_image(LIVE, precision)]
            ratios += [at(variant, precision, batch) / at(FLOOR, precision, batch) for batch in TO_FLOOR]
            names = ["mib_per_image", "of_live", *(f"to_floor_at_batch_{batch}" for batch in TO_FLOOR)]
            summary[variant][precision] = dict(zip(names, [mib, *ratios], strict=True))
            figures += [f"{mib:.1f}", *(f"{ratio:.2f}" for ratio in ratios)]
        lines.append(f"| {variant} | " + " | ".join(figures) + " |")
    store.finish(summary)
    text = "\n".join(lines) + "\n"
    write_atomically(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
