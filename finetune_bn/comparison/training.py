"""One short fine-tune of a copy of the model: from its weights, under one treatment, at one learning rate and seed."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from finetune_bn.comparison.arms import Arm, bound_steps, measure, switch, treat
from finetune_bn.comparison.feed import Feed
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.batches import Forward
from finetune_bn.utilities.randomness import RandomStates

WARMUP, WEIGHT_DECAY = 0.1, 0.05
POINTS = 20  # of the curve of the training loss

Scheduler = Any  # with `step()`
MakeOptimizer = Callable[[nn.Module, float, int], tuple[torch.optim.Optimizer, Scheduler | None]]


@dataclass(frozen=True)
class Trial:
    """What decides a training."""

    arm: str
    lr: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        score: higher is better; None where it failed.
        losses: (step, mean training loss since the one before).
        seconds: how long it took.
        failed: why it has no score.
    """

    score: float | None
    losses: tuple[tuple[int, float], ...]
    seconds: float
    failed: str | None = None


@dataclass
class Workbench:
    """What all trainings of a comparison share.

    Attributes:
        model: where they start; it is copied, never changed.
        train: the training batches.
        loss: `(model, batch)` returns the loss.
        score: `(model)` returns the score, higher is better; the model is in eval mode.
        optimizer: `(model, lr, steps)` returns an optimizer and its schedule, or None.
        images: training images drawn one by one, for statistics.
        part: attribute path of the part whose layers are treated.
        forward: how a batch is passed to the part; None as `recalibrate` does it.
        example: an input of the part.
        accumulate: batches of a step.
        clip: largest norm of a gradient; None for no limit.
        device: where the trainings run.
        autocast: makes the context of forward passes in training and evaluation.
    """

    model: nn.Module
    train: Feed
    loss: Callable[[nn.Module, Any], Tensor]
    score: Callable[[nn.Module], float]
    optimizer: MakeOptimizer
    images: Iterable[Any]
    part: str = ""
    forward: Forward | None = None
    example: Any = None
    accumulate: int = 1
    clip: float | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def fine_tune(bench: Workbench, arm: Arm, trial: Trial) -> Outcome:
    """Train a copy of the model and return its score; what goes wrong is told in the outcome, not raised.

    Nothing is left of it: random states are as before, the model was copied.
    """
    started = time.perf_counter()
    states = RandomStates(*([bench.device] if bench.device.type == "cuda" else []))
    losses: list[tuple[int, float]] = []
    try:
        torch.manual_seed(trial.seed)
        model = copied(bench.model).to(bench.device)
        treat(model, bench.part, arm, bench.images, bench.forward, bench.example)
        optimizer, schedule = bench.optimizer(model, trial.lr, trial.steps)
        bound_steps(optimizer, model, bench.part, arm, bench.example)
        failed = train(bench, arm, trial, model, optimizer, schedule, losses)
        score = None
        if failed is None:
            if arm.recalibrate:
                measure(model, bench.part, bench.images, bench.forward)
            model.eval()
            with torch.no_grad(), bench.autocast():
                score = float(bench.score(model))
            if not math.isfinite(score):
                score, failed = None, f"the score is {score}"
    except Exception as error:  # an arm that cannot be trained is a finding, whatever torch or the model raised
        text = " ".join(str(error).split())[:300]
        score, failed = None, text if isinstance(error, FinetuneBNError) else f"{type(error).__name__}: {text}"
    finally:
        states.restore()
    return Outcome(score, tuple(losses), time.perf_counter() - started, failed)


def train(
    bench: Workbench,
    arm: Arm,
    trial: Trial,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Scheduler | None,
    losses: list[tuple[int, float]],
) -> str | None:
    """Make the steps of a training; return why it was given up, or None.

    Args:
        bench: what trainings share.
        arm: the treatment, which was given to the model.
        trial: the training.
        model: the copy.
        optimizer: that of the copy.
        schedule: stepped after each step.
        losses: the curve of the training loss is added to it.
    """
    model.train()
    every = max(1, trial.steps // POINTS)
    switch_at = None if arm.frozen_fraction is None else round((1 - arm.frozen_fraction) * trial.steps)
    batches = bench.train.take(trial.seed, trial.steps * bench.accumulate)
    since: list[Tensor] = []
    for step in range(trial.steps):
        if step == switch_at:
            switch(model, bench.part, bench.images, bench.forward)
        optimizer.zero_grad()
        for _ in range(bench.accumulate):
            with bench.autocast():
                loss = bench.loss(model, next(batches))
            torch.autograd.backward(loss / bench.accumulate if bench.accumulate > 1 else loss)
            since.append(loss.detach())
        if bench.clip is not None:
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], bench.clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if (step + 1) % every == 0 or step + 1 == trial.steps:
            mean = torch.stack(since).double().mean().item()
            since.clear()
            if not math.isfinite(mean):
                return f"the training loss was {mean} by step {step + 1}"
            losses.append((step + 1, mean))
    return None


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model without its gradients.

    Raises:
        FinetuneBNError: it cannot be copied.
    """
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        why = f"copy.deepcopy said: {type(error).__name__}: {error}"
        raise FinetuneBNError(complaint("model", type(model).__name__, "a model that can be copied", why)) from error
    twin.zero_grad(set_to_none=True)
    return twin


def adamw(net: nn.Module, lr: float, steps: int) -> tuple[torch.optim.Optimizer, Scheduler]:
    """Return AdamW, vectors without weight decay, and its schedule: linear warm-up, then a cosine down to 0.

    Args:
        net: what is trained.
        lr: peak learning rate.
        steps: length of the schedule.

    Raises:
        FinetuneBNError: nothing of the net requires a gradient.
    """
    trained = [p for p in net.parameters() if p.requires_grad]
    if not trained:
        allowed = "a model with parameters that require gradients"
        raise FinetuneBNError(complaint("model", type(net).__name__, allowed))
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)
    warm = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (s + 1) / warm if s < warm else (1 + math.cos(math.pi * (s - warm) / max(1, steps - warm))) / 2,
    )
    return optimizer, schedule
