"""What keeps frozen BatchNorm from collapsing at a large learning rate: ways that were tried, one seed each.

The setting of study_small_batch.py at batch 4 (EfficientNet-Lite0, 9 emoji categories, 600 images, AdamW), 3 epochs
instead of 5, seed 0, at the rate that is best for frozen layers and at one five times as large, where they collapse.
Accuracy on validation emoji, and by how many running standard deviations the channel means of the last BatchNorm layer
have drifted in training. What came out of it is measured with three seeds in study_small_batch.py.

Hardware: 2 CPU cores, half an hour. Resumes where it was cut off. Result: results/study_robust_freezing.{json,md}.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
import study_small_batch as small
import torch
import torch.nn.functional as F
from store import Store
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.layers import FrozenBatchNorm
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.optim.step_limit import limit_steps
from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
RATES = (1e-3, 2e-4)
BATCH, EPOCHS, SEED = 4, 3, 0
FROZEN = fbn.Freeze("none")


@dataclass(frozen=True)
class Way:
    """A way to train frozen layers.

    Attributes:
        title: for the table.
        policy: what is done to BatchNorm.
        gradient: what is done to the gradients before each step.
        layers: what is done to the converted network.
        ratio: the limit on the optimizer's steps; None for none.
    """

    title: str
    policy: fbn.Policy = FROZEN
    gradient: Callable[[nn.Module], None] = lambda net: None
    layers: Callable[[nn.Module], None] = lambda net: None
    ratio: float | None = None


def clip(net: nn.Module) -> None:
    """Clip the gradient of the whole network at norm 1."""
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)


def clip_adaptively(net: nn.Module) -> None:
    """Clip the gradient of each output channel at 0.01 of its weights (Brock et al. 2021, section 4)."""
    for p in weights(net):
        size = p.detach().flatten(1).norm(dim=1).clamp_min(1e-3)
        factor = (0.01 * size / p.grad.flatten(1).norm(dim=1)).clamp_max(1)
        p.grad.mul_(factor.view(-1, *[1] * (p.dim() - 1)))


def centre(net: nn.Module) -> None:
    """Subtract from the gradient of each output channel its mean (Yong et al. 2020, gradient centralization)."""
    for p in weights(net):
        p.grad.sub_(p.grad.mean(tuple(range(1, p.dim())), keepdim=True))


def weights(net: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights of convolutions."""
    return (p for p in net.parameters() if p.dim() > 2 and p.grad is not None)


def follow_means(net: nn.Module) -> None:
    """Let the running means follow those of the batches, with momentum 0.05; the variances stay."""

    def follow(layer: FrozenBatchNorm, args: tuple[Tensor]) -> None:
        if layer.training:
            with torch.no_grad():
                layer.running_mean.lerp_(args[0].mean((0, 2, 3)), 0.05)

    for layer in net.modules():
        if isinstance(layer, FrozenBatchNorm):
            layer.register_forward_pre_hook(follow)


class PerImage(torch.autograd.Function):
    """The identity, whose gradient loses its mean over each image and its part along the image's normalized input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        normalized = (x - mean) * torch.rsqrt(var + 1e-3)
        along = (grad * normalized).mean((2, 3), keepdim=True)
        return grad - grad.mean((2, 3), keepdim=True) - normalized * along


def project_per_image(net: nn.Module) -> None:
    """Give each frozen layer BatchNorm's projected gradient with the statistics of each image."""
    for layer in net.modules():
        if isinstance(layer, FrozenBatchNorm):
            layer.register_forward_pre_hook(lambda layer, args: (PerImage.apply(args[0]),))


WAYS = {
    "none": Way("frozen, affine none"),
    "limit_5e-4": Way("steps limited, 5e-4 of the weights", ratio=5e-4),
    "renorm": Way("renorm, r = d = inf, statistics fixed", fbn.Renorm(math.inf, math.inf, momentum=0.0)),
    "clip": Way("gradient clipped at 1", gradient=clip),
    "follow": Way("means follow the batches", layers=follow_means),
    "per_image": Way("gradient projected by image, affine original", fbn.Freeze("original"), layers=project_per_image),
    "adaptive": Way("gradient clipped at 0.01 of a channel's weights", gradient=clip_adaptively),
    "centred": Way("gradient centred in each channel", gradient=centre),
    "renorm_moving": Way("renorm, r = d = inf, momentum 0.05", fbn.Renorm(math.inf, math.inf, momentum=0.05)),
    "limit_1e-3": Way("steps limited, 1e-3", ratio=1e-3),
    "limit_2.5e-4": Way("steps limited, 2.5e-4", ratio=2.5e-4),
}  # fmt: skip


def fine_tune(way: str, lr: float) -> dict[str, Any]:
    """Train one cell and return its figures."""
    from finetune_bn.backbones.create import create_backbone

    about, splits = WAYS[way], small.images(SEED)
    torch.manual_seed(SEED)
    net = fbn.convert(create_backbone("tf_efficientnet_lite0", "package", num_classes=9), about.policy, verify=False)
    about.layers(net)
    x, y = splits["train"]
    optimizer, schedule = cells.adamw(net, lr, EPOCHS * math.ceil(len(x) / BATCH))
    if about.ratio is not None:
        limit_steps(optimizer, net, about.ratio)
    started = time.perf_counter()
    order = torch.Generator().manual_seed(SEED)
    net.train()
    for _ in range(EPOCHS):
        total = 0.0
        for rows in torch.randperm(len(x), generator=order).split(BATCH):
            loss = F.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            about.gradient(net)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
    figures = {"seconds": time.perf_counter() - started, "train_loss": total / len(x)}
    net.eval()
    images, labels = splits["val"]
    logits, _ = small.predict(net, images)
    return figures | {
        "val_accuracy": 100 * (logits.argmax(1) == labels).float().mean().item(),
        "drift": drift(net, x[:64]),
    }


@torch.inference_mode()
def drift(net: nn.Module, x: Tensor) -> float:
    """Return how far the channel means of the last layer are from the running ones, in running sds: the median."""
    last = find_batch_norms(net)[-1].module
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    net(x)
    handle.remove()
    away = seen[0].mean((0, 2, 3)) - last.get_buffer("running_mean")
    return float((away.abs() * torch.rsqrt(last.get_buffer("running_var") + last.eps)).median())


def next_cells(store: Store) -> Iterator[dict[str, Any]]:
    """Yield the cells that are missing."""
    keys = [{"way": way, "lr": lr} for lr in RATES for way in WAYS]
    yield from (key for key in keys if not store.done(key))


def markdown(store: Store) -> str:
    """Return the table: accuracy, and drift in brackets."""
    head = " | ".join(f"{lr:g}" for lr in sorted(RATES))
    lines = [f"| validation accuracy (drift in sd) at learning rate | {head} |", "|---|---|---|"]
    for way, about in WAYS.items():
        found = [store.find(way=way, lr=lr) for lr in sorted(RATES)]
        figures = [f"{row['val_accuracy']:.1f} ({row['drift']:.1f})" if row else "" for row in found]
        lines += [f"| {about.title} | {' | '.join(figures)} |"] if any(figures) else []
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the study, or only write its table anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--report-only", action="store_true", help="write the table from the rows there are")
    args = parser.parse_args()
    path = ROOT / "results" / "study_robust_freezing.json"
    store = Store(path, "python scripts/study_robust_freezing.py", [SEED], device="cpu")
    if not args.report_only:
        cells.run(store, next_cells, fine_tune, args.workers, "val_accuracy")
    store.finish({way: {f"{r['lr']:g}": r["val_accuracy"] for r in store.rows if r["way"] == way} for way in WAYS})
    write_atomically(path.with_suffix(".md"), markdown(store))
    print(markdown(store))


if __name__ == "__main__":
    main()
