"""What keeps frozen BatchNorm from collapsing at a large learning rate: one list of ways, each with the same rates.

150 steps with batches of 4 of 400 emoji, by the protocol of scripts/compact.py, EfficientNet-Lite0 and MobileNetV2.
Every way looks for its rate on one ladder by one rule: it starts at 1e-4 and 3e-4, near the best of frozen layers under
AdamW, at 1e-3 and at 3e-3, where they collapse, and goes on while a neighbor of its best rate is untried. The seed that
chooses the rate on validation images is not among those that report on test images. Told are validation accuracy at the
four starting rates, by how many running standard deviations the channel means of the last BatchNorm layer have drifted
in training, the test accuracy at the rate that was chosen, and by how much it is ahead of AdamW as it is, seed by seed.

AdamW and LAMB decouple their weight decay of 0.05. SGD and LARC add theirs to the gradient, where momentum makes it ten
times as much, and frozen BatchNorm does not undo what that does to the weights: they have 1e-4 (He et al. 2016, section
3.4).

Order, for one network and then the other: all ways at 3e-3, at 1e-3, at 3e-4, at 1e-4, the search, the reporting seeds;
a run that is cut off has the first ones. Hardware: 2 CPU cores, a quarter of an hour a network. Resumes where it was
cut off. Result: results/study_robust_freezing.{json,md}.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import arms
import cells
import torch
from compact import CHOOSE, FAMILIES, Objective, Setting, missing, pictures, scores, train, untrained
from compact import LADDER as USUAL
from store import Store
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.layers import FrozenBatchNorm
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.optim.step_limit import limit_steps
from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
LADDER = (*USUAL, 0.1, 0.3, 1.0)  # SGD and LARC may want more
FIRST_RUNGS = (3e-3, 1e-3, 3e-4, 1e-4)
SEEDS = (0, 1, 2)
SETTINGS = {family: Setting(family, 4, 400, "same", length=150) for family in FAMILIES}
COUPLED_DECAY = 1e-4
FROZEN = fbn.Freeze("none")
Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class Way:
    """A way to train frozen layers.

    Attributes:
        title: for the table.
        policy: what is done to BatchNorm.
        gradient: what is done to the gradients before each step.
        layers: what is done to the converted network.
        ratio: the limit on the optimizer's steps; None for none.
        optimizer: from parameter groups and a learning rate.
        warmup: share of the steps over which the learning rate rises.
    """

    title: str
    policy: fbn.Policy = FROZEN
    gradient: Callable[[nn.Module], None] = lambda net: None
    layers: Callable[[nn.Module], None] = lambda net: None
    ratio: float | None = None
    optimizer: Callable[[list[dict[str, Any]], float], Optimizer] = lambda groups, lr: torch.optim.AdamW(
        groups, lr=lr, fused=True
    )
    warmup: float = cells.WARMUP


class StableAdamW(torch.optim.AdamW):
    """AdamW that steps less far where a tensor's gradients are larger than it expects (Wortsman et al. 2023).

    The step of a tensor is divided by the root mean square of its gradient over the root of its second moment, where
    that is above 1.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step, then shorten what was too long."""
        before = [(p, p.detach().clone()) for group in self.param_groups for p in group["params"] if p.grad is not None]
        result = super().step(closure)
        for p, old in before:
            second = self.state[p]["exp_avg_sq"] / (1 - 0.999 ** float(self.state[p]["step"]))
            size = (p.grad.square() / second.clamp_min(1e-16)).mean().sqrt()
            p.copy_(old + (p - old) / size.clamp_min(1.0))
        return result


def lamb(groups: list[dict[str, Any]], lr: float) -> Optimizer:
    """Return LAMB whose trust ratio is 1 at most (Fong et al. 2020): timm's, without its clipping of the gradient."""
    from timm.optim import Lamb

    return Lamb(groups, lr=lr, trust_clip=True, max_grad_norm=None, decoupled_decay=True)


def larc(groups: list[dict[str, Any]], lr: float) -> Optimizer:
    """Return SGD with momentum whose step is 0.001 of a tensor's norm at most: LARC, timm's LARS with trust clip."""
    from timm.optim import Lars

    return Lars(_coupled(groups), lr=lr, momentum=0.9, trust_coeff=1e-3, trust_clip=True)


def sgd(groups: list[dict[str, Any]], lr: float) -> Optimizer:
    """Return SGD with momentum."""
    return torch.optim.SGD(_coupled(groups), lr=lr, momentum=0.9)


def _coupled(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [group | {"weight_decay": COUPLED_DECAY * (group["weight_decay"] > 0)} for group in groups]


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
    "none": Way("AdamW"),
    "limit_5e-4": Way("AdamW, steps limited to 5e-4 of the weights", ratio=5e-4),
    "lamb": Way("LAMB with trust clip", optimizer=lamb),
    "clip": Way("AdamW, gradient clipped at 1", gradient=clip),
    "sgd": Way("SGD with momentum", optimizer=sgd),
    "limit_1e-3": Way("AdamW, steps limited to 1e-3", ratio=1e-3),
    "limit_2.5e-4": Way("AdamW, steps limited to 2.5e-4", ratio=2.5e-4),
    "warm-up": Way("AdamW, warm-up over half of the steps", warmup=0.5),
    "agc": Way("AdamW, gradient clipped at 0.01 of a channel's weights (AGC)", gradient=clip_adaptively),
    "update_rms": Way("AdamW, update's root mean square clipped at 1", optimizer=StableAdamW),
    "larc": Way("LARC", optimizer=larc),
    "limit_2e-3": Way("AdamW, steps limited to 2e-3", ratio=2e-3),
    "limit_1e-4": Way("AdamW, steps limited to 1e-4", ratio=1e-4),
    "sgd_limit_5e-4": Way("SGD with momentum, steps limited to 5e-4", optimizer=sgd, ratio=5e-4),
    "renorm": Way("AdamW, renorm without limits, affine trained", fbn.Renorm(math.inf, math.inf, momentum=0.0)),
    "follow": Way("AdamW, means follow the batches", layers=follow_means),
    "per_image": Way(
        "AdamW, gradient projected by image, affine trained", fbn.Freeze("original"), layers=project_per_image
    ),
    "centred": Way("AdamW, gradient centred in each channel", gradient=centre),
}


def fine_tune(network: str, way: str, lr: float, seed: int) -> dict[str, Any]:
    """Train one cell and return its figures."""
    started, about, setting = time.perf_counter(), WAYS[way], SETTINGS[network]
    net = fbn.convert(untrained(setting, seed), about.policy, verify=False)
    about.layers(net)
    optimizer = about.optimizer(cells.groups(net), lr)
    schedule = cells.warm_cosine(optimizer, setting.steps, about.warmup)
    if about.ratio is not None:
        limit_steps(optimizer, net, about.ratio)
    net, loss = train(net, optimizer, schedule, setting, seed, Objective(setting, seed), gradient=about.gradient)
    figures = {"loss": loss, **scores(net, setting, seed), "drift": drift(net, pictures(setting, seed).train[:64])}
    return figures | {"seconds": time.perf_counter() - started}


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


def tried(store: Store, network: str, way: str) -> dict[float, float]:
    """Return the validation accuracy at each rate that was tried, of the seed that chooses."""
    rows = [r for r in store.rows if (r["network"], r["way"], r["seed"]) == (network, way, CHOOSE)]
    return {row["lr"]: row["val"] for row in rows}


def next_cells(store: Store) -> Iterator[dict[str, Any]]:
    """Yield the cells that can be measured now, most important first; more appear as results come in."""
    for network in (name for name, setting in SETTINGS.items() if missing(setting) is None):
        found = {way: tried(store, network, way) for way in WAYS}
        keys = [(way, lr, CHOOSE) for lr in FIRST_RUNGS for way in WAYS]
        keys += [(way, lr, CHOOSE) for way in WAYS for lr in cells.rates_to_try(found[way], LADDER, FIRST_RUNGS)]
        chosen = {way: cells.chosen_rate(found[way], LADDER, FIRST_RUNGS) for way in WAYS}
        keys += [(way, lr, seed) for seed in SEEDS for way, lr in chosen.items() if lr is not None]
        named = ({"network": network, "way": way, "lr": lr, "seed": seed} for way, lr, seed in dict.fromkeys(keys))
        yield from (key for key in named if not store.done(key))


def summarize(store: Store) -> list[dict[str, Any]]:
    """Return a line for each network and way that was measured."""
    lines = []
    for network, (way, about) in ((network, item) for network in SETTINGS for item in WAYS.items()):
        rates = tried(store, network, way)
        if not rates:
            continue
        lr = cells.chosen_rate(rates, LADDER, FIRST_RUNGS)
        at = {f"{rate:g}": store.find(network=network, way=way, lr=rate, seed=CHOOSE) for rate in sorted(FIRST_RUNGS)}
        shown = {rate: row and {"accuracy": row["val"], "drift": row["drift"]} for rate, row in at.items()}
        reported = (store.find(network=network, way=way, lr=lr, seed=seed) for seed in SEEDS if lr is not None)
        values = {row["seed"]: row["test"] for row in reported if row}
        lines.append({"network": network, "way": way, "title": about.title, "at": shown, "lr": lr, "values": values})
    for line in lines:
        plain = next((x["values"] for x in lines if (x["network"], x["way"]) == (line["network"], "none")), {})
        seeds = [] if line["way"] == "none" else sorted(plain.keys() & line["values"].keys())
        differences = [line["values"][seed] - plain[seed] for seed in seeds]
        line["ahead"] = cells.gain(differences) if len(seeds) > 1 else None
    return lines


def markdown(store: Store) -> str:
    """Return the table: accuracy, and drift in brackets."""
    head = [f"at {lr:g} (drift in sd)" for lr in sorted(FIRST_RUNGS)]
    head = [
        "network",
        "way to train frozen layers",
        *head,
        "rate chosen",
        "test accuracy there",
        "ahead of AdamW, 95 % interval",
        "seeds",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for line in summarize(store):
        figures = [f"{row['accuracy']:.1f} ({_drift(row['drift'])})" if row else "" for row in line["at"].values()]
        lr, values = line["lr"], list(line["values"].values())
        told = f"{fmean(values):.1f}" if values else ""
        ahead = arms.difference(line["ahead"]) if line["ahead"] else ""
        rate = "search not over" if lr is None else f"{lr:g}{' (edge)' * (lr in (LADDER[0], LADDER[-1]))}"
        columns = [line["network"], line["title"], *figures, rate, told, ahead, str(len(values) or "")]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def _drift(drift: float | None) -> str:
    return "no number" if drift is None else f"{drift:.1f}"


def main() -> None:
    """Run the study, or only write its table anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--report-only", action="store_true", help="write the table from the rows there are")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.out / "study_robust_freezing.json"
    store = Store(path, "python scripts/study_robust_freezing.py", [CHOOSE, *SEEDS], device="cpu")
    if not args.report_only:
        cells.run(store, next_cells, fine_tune, args.workers, "val")
    store.finish({"ways": summarize(store)})
    write_atomically(path.with_suffix(".md"), markdown(store))
    print(markdown(store))


if __name__ == "__main__":
    main()
