"""The settings and arms of `study_advice.py`, and how one of them is trained; other studies train the same ones."""

from __future__ import annotations

import time
from typing import Any

import arms
import cells
import torch
from compact import (
    CHOOSE,
    FIRST_RUNGS,
    LADDER,
    Objective,
    Setting,
    pictures,
    recalibrate,
    scores,
    train,
    untrained,
)
from store import Store
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.layers.group_norm import Eps
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.optim.step_limit import limit_steps

REPORT = (0, 1, 2, 3, 4)
SCHEDULED = 0.8
GROUP_NORM: dict[str, Eps] = {"group_norm": "normalize", "group_norm_center": "center", "group_norm_own": "own"}
POLICIES = {
    "live": fbn.Keep(),
    "none": fbn.Freeze("none"),
    "original": fbn.Freeze("original"),
    "limited": fbn.Freeze("none"),  # with the steps of the optimizer limited
    "scheduled": fbn.Keep(),  # until SCHEDULED of the steps; then recalibrated and frozen
    "group_norm": fbn.ToGroupNorm(groups=1, eps="normalize"),  # calibrated on training images
    "affine": fbn.Freeze("original"),  # gamma, beta and the head are trained, and nothing else
}
ARMS = (*POLICIES, "recalibrated")  # the last is `live`, its statistics recalibrated after training


# In the order of importance: a run that is cut off has the first ones.
SETTINGS = tuple(
    Setting(*row)
    for row in (
        ("lite0", 4, 400, "same"),
        ("mobilenetv2", 4, 400, "same"),
        ("lite0", 32, 400, "same", "pk"),
        ("lite0", 16, 100, "corrupted"),
        ("mobilenetv2", 4, 100, "digits"),
        ("lite0", 64, 1600, "digits"),
        ("mobilenetv2", 16, 1600, "other"),
        ("lite0", 64, 400, "same"),
        ("mobilenetv2", 64, 400, "same"),
        ("mobilenetv2", 32, 1600, "same", "pk"),
        ("lite0", 16, 400, "same"),
        ("mobilenetv2", 16, 400, "same"),
        ("lite0", 2, 400, "same"),
        ("mobilenetv2", 2, 400, "same"),
        ("lite0", 4, 100, "other"),
        ("mobilenetv2", 4, 1600, "corrupted"),
        ("lite0", 32, 400, "other", "pk"),
        ("mobilenetv2", 64, 100, "digits"),
        ("lite0", 16, 400, "digits"),
        ("mobilenetv2", 2, 400, "corrupted"),
        ("mobilenetv2", 32, 400, "corrupted", "pk"),
        ("lite0", 64, 400, "other"),
        ("lite0", 32, 100, "corrupted", "pk"),
        ("mobilenetv2", 32, 100, "other", "pk"),
    )
)
BY_NAME = {setting.name: setting for setting in SETTINGS}


def train_arm(setting: Setting, arm: str, lr: float, seed: int) -> dict[str, Any]:
    """Train an arm in any setting and return its figures."""
    started = time.perf_counter()
    net = untrained(setting, seed, GROUP_NORM.get(arm))
    if arm not in GROUP_NORM:
        net = fbn.convert(net, POLICIES[arm], verify=False)
    if arm == "affine":
        fbn.train_only(net, "norm")
    objective = Objective(setting, seed)
    optimizer, schedule = cells.adamw(net, lr, setting.steps, objective.groups(lr))
    if arm == "limited":
        limit_steps(optimizer, net)

    def freeze(step: int, net: nn.Module) -> nn.Module:
        if arm == "scheduled" and step == round(SCHEDULED * setting.steps):
            recalibrate(net, setting, seed)
            return fbn.convert(net, fbn.Freeze("none"), verify=False).train()
        return net

    net, loss = train(net, optimizer, schedule, setting, seed, objective, freeze)
    figures = {"loss": loss, **scores(net, setting, seed)}
    if arm == "live":
        recalibrate(net, setting, seed)
        figures |= {f"{name}/recalibrated": value for name, value in scores(net, setting, seed).items()}
    return figures | {"seconds": time.perf_counter() - started}


def shift_of(setting: Setting) -> dict[str, float]:
    """Return how far the inputs of the layers are from what the statistics of the weights say, before training.

    `shift`: median over layers of the mean over channels of |mean - running_mean| / sd; `log_var` the same of
    |log(variance / running_var)|. Up to 256 training images of the choosing seed, the network in eval mode.
    """
    data = pictures(setting, CHOOSE)
    net = untrained(setting, CHOOSE).eval()
    sums: dict[int, tuple[float, float]] = {}

    def look(layer: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].double()
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        source = layer.running_var.double() + layer.eps
        shift = ((mean - layer.running_mean).abs() / source.sqrt()).mean().item()
        sums[id(layer)] = shift, ((var + layer.eps) / source).log().abs().mean().item()

    hooks = [site.module.register_forward_pre_hook(look) for site in find_batch_norms(net)]
    with torch.inference_mode():
        net(data.train[:256])
    for hook in hooks:
        hook.remove()
    columns = torch.tensor(list(sums.values())).median(0).values
    return {"shift": columns[0].item(), "log_var": columns[1].item()}


def tried(store: Store, setting: str, arm: str) -> dict[float, float]:
    """Return the validation figure of the choosing seed by learning rate."""
    return arms.tried(store.rows, setting, arm)


def chosen_rate(store: Store, setting: str, arm: str) -> float | None:
    """Return an arm's learning rate once its search is over."""
    return cells.chosen_rate(tried(store, setting, arm), LADDER, FIRST_RUNGS)
