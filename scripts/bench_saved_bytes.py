"""Bytes that a training step keeps for backward, by what was done to the BatchNorm (BN) layers.

Counted at 224 pixels with saved-tensor hooks: each storage once, parameters and buffers left out, float32 and bfloat16
autocast, beside torchvision's and timm's frozen layers and the same net without norm layers (the floor). ResNet-50 by
image, as the slope between two batch sizes; other nets and batch sizes in total, with the affine learnable. BN layers
have random affine values and statistics. Numbers of bytes do not depend on the machine. Result:
results/bench_saved_bytes.{json,md} and bench_saved_bytes_nets.md; a few minutes on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import track
from store import Store
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

import finetune_bn as fbn
from finetune_bn.diagnosis.memory import saved_bytes
from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent


def replace_batch_norms(model: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> nn.Module:
    """Replace each BatchNorm2d of `model` by what `make` returns for it."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, make(child))
    return model


def torchvision_frozen(bn: nn.BatchNorm2d) -> nn.Module:
    """Return torchvision's frozen layer with the values of `bn`."""
    frozen = FrozenBatchNorm2d(bn.num_features, eps=bn.eps)
    frozen.load_state_dict(bn.state_dict())
    return frozen


def eval_mode(model: nn.Module) -> nn.Module:
    """Return the model with its BatchNorm layers in eval mode and their affine constant, as many recipes do."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model


def without_norm(bn: nn.BatchNorm2d) -> nn.Module:
    """Return what is left of a BN layer without its norm: the activation of timm's norm+act layers."""
    return getattr(bn, "act", None) or nn.Identity()


def pretrained_look(model: nn.Module) -> nn.Module:
    """Give the BN layers of `model` affine values and statistics at random."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1.7)
            nn.init.normal_(module.bias, 0.0, 0.5)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "live BatchNorm": lambda m: m,
    "bn.eval(), affine constant": eval_mode,
    "torchvision FrozenBatchNorm2d": lambda m: replace_batch_norms(m, torchvision_frozen),
    "timm freeze_batch_norm_2d": freeze_batch_norm_2d,
    "ours, affine=none": lambda m: fbn.convert(m, fbn.Freeze("none"), verify=False),
    "ours, affine=shift": lambda m: fbn.convert(m, fbn.Freeze("shift"), verify=False),
    "ours, affine=original, fold=never": lambda m: fbn.convert(m, fbn.Freeze("original", fold="never"), verify=False),
    "ours, affine=original, fold=always": lambda m: fbn.convert(m, fbn.Freeze("original", fold="always"), verify=False),
    "ours, affine=merged, fold=always": lambda m: fbn.convert(m, fbn.Freeze("merged", fold="always"), verify=False),
    "no norm layers (floor)": lambda m: replace_batch_norms(m, without_norm),
}
# With fold="auto" the bytes do not grow evenly with the batch, so these two have totals only.
BY_SHAPE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ours, affine=original": lambda m: fbn.convert(m, fbn.Freeze("original"), verify=False),
    "ours, affine=merged": lambda m: fbn.convert(m, fbn.Freeze("merged"), verify=False),
}
LIVE, NEVER, ORIGINAL, MERGED, FLOOR = (
    "live BatchNorm",
    "ours, affine=original, fold=never",
    "ours, affine=original",
    "ours, affine=merged",
    "no norm layers (floor)",
)
# Net, precision and batch size of the totals.
TOTALS = [
    ("resnet50", "fp32", 8),
    ("resnet50", "bf16 autocast", 8),
    ("resnet18", "fp32", 4),
    ("densenet121", "fp32", 4),
    ("densenet121", "bf16 autocast", 4),
    ("tf_efficientnet_lite0", "fp32", 4),
    ("mobilenetv3_large_100", "fp32", 4),
    ("resnet50", "fp32", 32),
    ("resnet50", "bf16 autocast", 32),
]


def measure(net: str, variant: str, precision: str, batch: int) -> dict[str, Any]:
    """Return the saved bytes of one cell."""
    torch.manual_seed(0)
    model = (VARIANTS | BY_SHAPE)[variant](pretrained_look(timm.create_model(net).train()))
    x = torch.randn(batch, 3, 224, 224)

    def step() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast"):
            return model(x)  # type: ignore[no-any-return]

    total = saved_bytes(model, step)
    return {"net": net, "variant": variant, "precision": precision, "batch": batch, "bytes": total}


def by_image(store: Store, low: int, high: int) -> tuple[dict[str, Any], str]:
    """Return the figures of ResNet-50 per image, and their table."""

    def per_image(variant: str, precision: str) -> float:
        rows = [store.find(net="resnet50", variant=variant, precision=precision, batch=b) for b in (low, high)]
        first, second = (row["bytes"] for row in rows if row)
        return (second - first) / (high - low) / 2**20

    lines = [
        "| ResNet-50, 224 px | fp32, MiB per image | of live BN | bf16 autocast | of live BN |",
        "|---|---|---|---|---|",
    ]
    summary: dict[str, Any] = {}
    for variant in VARIANTS:
        summary[variant] = {}
        cells = []
        for precision in ("fp32", "bf16 autocast"):
            mib = per_image(variant, precision)
            ratio = mib / per_image(LIVE, precision)
            summary[variant][precision] = {"mib_per_image": mib, "of_live": ratio}
            cells += [f"{mib:.1f}", f"{ratio:.2f}"]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return summary, "\n".join(lines) + "\n"


def in_total(store: Store) -> tuple[list[dict[str, Any]], str]:
    """Return the totals with the affine learnable, as ratios to the floor and to live BN, and their table."""
    names = {NEVER: "original, never folded", ORIGINAL: "original", MERGED: "merged"}
    header = ["net, batch, precision", "floor, MiB", "live BN", *names.values(), "original, of live BN"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    summary = []
    for net, precision, batch in TOTALS:
        rows = {v: store.find(net=net, variant=v, precision=precision, batch=batch) for v in (LIVE, FLOOR, *names)}
        total = {variant: row["bytes"] for variant, row in rows.items() if row}
        of_floor = {variant: total[variant] / total[FLOOR] for variant in (LIVE, *names)}
        of_live = total[ORIGINAL] / total[LIVE]
        cells = [f"{net}, {batch}, {precision}", f"{total[FLOOR] / 2**20:.1f}"]
        cells += [f"{ratio:.3f}" for ratio in of_floor.values()] + [f"{of_live:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
        entry = {"net": net, "precision": precision, "batch": batch, "of_floor": of_floor}
        summary.append(entry | {"of_live": {variant: total[variant] / total[LIVE] for variant in names}})
    return summary, "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs=2, default=(2, 4), help="two batch sizes; the slope is per image")
    low, high = parser.parse_args().batches
    path = ROOT / "results" / "bench_saved_bytes.json"
    store = Store(path, "python scripts/bench_saved_bytes.py", [0], device="cpu")
    cells = [("resnet50", v, p, b) for v in VARIANTS for p in ("fp32", "bf16 autocast") for b in (low, high)]
    cells += [(net, v, p, b) for net, p, b in TOTALS for v in (LIVE, NEVER, ORIGINAL, MERGED, FLOOR)]
    for net, variant, precision, batch in track(cells, description="saved bytes"):
        if not store.done({"net": net, "variant": variant, "precision": precision, "batch": batch}):
            store.add(measure(net, variant, precision, batch))
    summary, table = by_image(store, low, high)
    totals, table_of_totals = in_total(store)
    store.finish({"resnet50": summary, "totals": totals})
    write_atomically(path.with_suffix(".md"), table)
    write_atomically(path.with_name("bench_saved_bytes_nets.md"), table_of_totals)
    print(table, table_of_totals, sep="\n")


if __name__ == "__main__":
    main()
