"""Bytes that a training step of ResNet-50 keeps for backward, by what was done to its BatchNorm layers.

Counted at 224 pixels with saved-tensor hooks: each storage once, parameters and buffers left out, float32 and bfloat16
autocast, beside torchvision's and timm's frozen layers and the same net without norm layers (the floor). Numbers of
bytes do not depend on the machine. Result: results/bench_saved_bytes.{json,md}; under a minute on a CPU.
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
from finetune_bn.files import write_atomically
from finetune_bn.memory import saved_bytes

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


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "live BatchNorm": lambda m: m,
    "bn.eval(), affine constant": eval_mode,
    "torchvision FrozenBatchNorm2d": lambda m: replace_batch_norms(m, torchvision_frozen),
    "timm freeze_batch_norm_2d": freeze_batch_norm_2d,
    "ours, affine=none": lambda m: fbn.convert(m, fbn.Freeze("none")),
    "ours, affine=shift": lambda m: fbn.convert(m, fbn.Freeze("shift")),
    "ours, affine=merged": lambda m: fbn.convert(m, fbn.Freeze("merged")),
    "ours, affine=original": lambda m: fbn.convert(m, fbn.Freeze("original")),
    "no norm layers (floor)": lambda m: replace_batch_norms(m, lambda bn: nn.Identity()),
}


def measure(variant: str, precision: str, batch: int) -> dict[str, Any]:
    """Return the saved bytes of one cell."""
    torch.manual_seed(0)
    model = VARIANTS[variant](timm.create_model("resnet50").train())
    x = torch.randn(batch, 3, 224, 224)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast"):
            model(x)

    total = saved_bytes(model, step)
    return {"variant": variant, "precision": precision, "batch": batch, "bytes": total}


def main() -> None:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs=2, default=(2, 4), help="two batch sizes; the slope is per image")
    low, high = parser.parse_args().batches
    path = ROOT / "results" / "bench_saved_bytes.json"
    store = Store(path, "python scripts/bench_saved_bytes.py", [0], device="cpu")
    cells = [(v, p, b) for v in VARIANTS for p in ("fp32", "bf16 autocast") for b in (low, high)]
    for variant, precision, batch in track(cells, description="saved bytes"):
        if not store.done({"variant": variant, "precision": precision, "batch": batch}):
            store.add(measure(variant, precision, batch))

    def per_image(variant: str, precision: str) -> float:
        rows = [store.find(variant=variant, precision=precision, batch=b) for b in (low, high)]
        first, second = (row["bytes"] for row in rows if row)
        return (second - first) / (high - low) / 2**20

    lines = [
        "| ResNet-50, 224 px | fp32, MiB per image | of live BN | bf16 autocast | of live BN |",
        "|---|---|---|---|---|",
    ]
    summary: dict[str, Any] = {}
    for variant in VARIANTS:
        summary[variant] = {}
        cells_ = []
        for precision in ("fp32", "bf16 autocast"):
            mib = per_image(variant, precision)
            ratio = mib / per_image("live BatchNorm", precision)
            summary[variant][precision] = {"mib_per_image": mib, "of_live": ratio}
            cells_ += [f"{mib:.1f}", f"{ratio:.2f}"]
        lines.append(f"| {variant} | " + " | ".join(cells_) + " |")
    store.finish(summary)
    text = "\n".join(lines) + "\n"
    write_atomically(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
