"""Find a learning rate for a treatment: the range test of Smith 2017, "Cyclical learning rates for training networks".

One training in which the learning rate grows step by step, by the same factor each. At first the loss stays, then it
falls, then it rises: where it falls most steeply the rate does most for a step. Frozen layers and live ones differ in
this curve, so it is measured under the treatment that is going to be trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from finetune_bn.comparison.arms import Arm, bound_steps, check_layers, checked_arms, treat
from finetune_bn.comparison.feed import Feed, as_batches, one_by_one
from finetune_bn.comparison.scoring import predictor, supervised
from finetune_bn.comparison.training import MakeOptimizer, adamw, copied
from finetune_bn.conversion.policies import Policy
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.batches import Forward
from finetune_bn.utilities.checks import number
from finetune_bn.utilities.probe import unwrapped
from finetune_bn.utilities.progress import progress_bar
from finetune_bn.utilities.randomness import RandomStates
from finetune_bn.utilities.rendering import BLUE, FAINT, FONT, INK, VERMILION, fonts, new_figure
from finetune_bn.utilities.results import Result, Shown

GIVEN_UP = 4.0  # times the lowest smoothed loss: the rest of the range is behind the point
WIDTH = 25  # the smoothing kernel's standard deviation is so small a part of the range
CLEAR = 4.0  # standard errors that the loss has to fall, to tell anything
NEARLY = 0.95  # of its whole fall: there it is as low as it gets, whether it rises again or all images are learned


@dataclass(frozen=True)
class LearningRate(Result):
    """What `find_learning_rate` found; `print` it, or take `lr`.

    Attributes:
        arm: name of the treatment.
        lr: the learning rate to use: the smaller of the next, and of a tenth of `lowest`.
        steepest: where the smoothed loss falls most steeply.
        lowest: where it is as low as it gets; beyond, it rises again, or all images are learned.
        rates: the learning rates of the steps.
        losses: the loss of each step, before it was made.
        smoothed: the same, smoothed over neighboring rates.
    """

    arm: str
    lr: float
    steepest: float
    lowest: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        curve = {name: list(getattr(self, name)) for name in ("rates", "losses", "smoothed")}
        return {"arm": self.arm, "lr": self.lr, "steepest": self.steepest, "lowest": self.lowest} | curve

    def shown(self) -> Shown:
        """Return the rate and where it is from, in a sentence."""
        return Shown(
            f"{self.arm}: lr {self.lr:.2g} (the loss falls most steeply at {self.steepest:.2g}, is as low as it "
            f"gets at {self.lowest:.2g}; {len(self.rates)} steps from {self.rates[0]:.2g} to {self.rates[-1]:.2g})"
        )

    def plot(self) -> Any:
        """Return a matplotlib figure: the loss by learning rate, and the rate that is proposed.

        Raises:
            MissingDependency: matplotlib is not installed.
        """
        figure = new_figure(7.0, 4.2)
        with fonts():
            axes = figure.subplots()
            axes.plot(self.rates, self.losses, ".", color=BLUE, alpha=0.4, label="a step's loss")
            axes.plot(self.rates, self.smoothed, color=BLUE, linewidth=1.8, label="smoothed")
            axes.axvline(self.lr, color=VERMILION, linestyle="--", label=f"lr {self.lr:.2g}")
            axes.set_xscale("log")
            low, high = min(self.smoothed), max(self.losses[: max(1, len(self.losses) // 2)])
            axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
            title = f"Range test, {self.arm}"
            axes.set_title(title, loc="left", fontsize=1.1 * FONT, color=INK, fontweight="bold", parse_math=False)
            axes.set_xlabel("learning rate", fontsize=FONT, color=INK)
            axes.set_ylabel("training loss", fontsize=FONT, color=INK)
            axes.grid(color=FAINT, linewidth=0.7)
            axes.tick_params(labelcolor=INK, length=0)
            for side, spine in axes.spines.items():
                spine.set(visible=side in ("left", "bottom"), color=FAINT)
            axes.legend(frameon=False, fontsize=0.85 * FONT, labelcolor=INK)
        return figure


def find_learning_rate(
    model: nn.Module,
    policy: str | Policy | Arm,
    train: Any,
    *,
    low: float = 1e-6,
    high: float = 1.0,
    steps: int = 100,
    loss: Callable[[Any, Any], Tensor] | None = None,
    optimizer: MakeOptimizer | None = None,
    forward: Forward | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> LearningRate:
    """Find a learning rate for `model` under a treatment, by one short training of a copy; `model` stays as it is.

    The rate grows from `low` to `high`, by the same factor at each step, until the loss is `GIVEN_UP` times its lowest.
    Losses are smoothed over neighboring rates. Proposed is where the loss falls most steeply (Smith 2017), or a tenth
    of where it is as low as it gets, if that is smaller. It is a place to begin; `compare` tries rates by what they
    lead to.

    Args:
        model: any module with BatchNorm layers and the head that it is to be trained with.
        policy: the treatment: a policy, or a name out of `ARMS` (see `compare`).
        train: a DataLoader, a list of batches (inputs, targets), or a pair of tensors.
        low: the first learning rate.
        high: the last.
        steps: how many there are, 20 or more. Small or mixed batches want more, as their losses differ more.
        loss: `(outputs, targets)` returns the loss. Default: cross-entropy.
        optimizer: `(model, lr, steps)` returns an optimizer and a schedule, which is not used. Default: AdamW.
        forward: `(model, batch)` passes a batch to the model.
        batch_size: images of a batch, where `train` is a pair of tensors.
        seed: decides the order of the images and dropout.
        device: where it runs; None: where the model is.
        progress: show a progress bar; None: on a terminal.

    Returns:
        The rate, and the curve that it was read from.

    Raises:
        FinetuneBNError: an argument cannot be used, or the curve does not tell: the loss does not fall clearly, or
            still falls at `high`, or rises from `low` on.
    """
    model = unwrapped(model)
    check_layers(model)
    named = {"given": policy} if isinstance(policy, Policy) else [policy]
    (arm,) = checked_arms(named).values()
    name = arm.what if isinstance(policy, Policy) else arm.name
    low = float(number("low", low, above=0, below=math.inf))
    high = float(number("high", high, above=low, below=math.inf))
    steps = number("steps", steps, least=20, whole=True)
    seed = number("seed", seed, least=0, whole=True)
    like = next((t for t in (*model.parameters(), *model.buffers())), torch.empty(0))
    where = like.device if device is None else torch.device(device)
    batches = as_batches(train, "train", batch_size, training=True)
    feed = Feed(batches, "train", lambda batch: tree_map_only(Tensor, lambda t: t.to(where), batch))
    predict = predictor(model, forward, where)
    of_batch = supervised(predict, F.cross_entropy if loss is None else loss)
    rates = [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]
    states = RandomStates(*([where] if where.type == "cuda" else []))
    try:
        torch.manual_seed(seed)
        net = copied(model).to(where)
        treat(net, "", arm, one_by_one(batches), forward, None)
        made, _ = (optimizer or adamw)(net, low, steps)
        bound_steps(made, net, "", arm, None)
        with progress_bar("Range test", "steps", steps, progress) as report:
            losses = _ramp(net.train(), made, feed.take(seed, steps), of_batch, rates, report)
    finally:
        states.restore()
        feed.leave()
    return read_off(name, rates[: len(losses)], losses, low, high)


def _ramp(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Any,
    of_batch: Callable[[nn.Module, Any], Tensor],
    rates: Sequence[float],
    report: Callable[[int, str], None],
) -> list[float]:
    """Train at each rate for a step and return the losses, up to where the training diverges."""
    # A schedule that was made with the optimizer has set the rate of its first step already.
    first = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    losses: list[float] = []
    running, lowest = 0.0, math.inf
    for i, (rate, batch) in enumerate(zip(rates, batches, strict=True), 1):
        for group, lr in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = lr * rate / rates[0]
        optimizer.zero_grad()
        loss = of_batch(net, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            return losses
        losses.append(value)
        running = 0.8 * running + 0.2 * value
        smooth = running / (1 - 0.8**i)
        lowest = min(lowest, smooth) if i > 5 else lowest
        if smooth > GIVEN_UP * lowest > 0:
            return losses
        torch.autograd.backward(loss)
        optimizer.step()
        report(i, f"lr {rate:.1g}, loss {value:.3g}")
    return losses


def read_off(arm: str, rates: Sequence[float], losses: Sequence[float], low: float, high: float) -> LearningRate:
    """Return the learning rate that a curve of losses tells.

    Args:
        arm: name of the treatment.
        rates: ascending, by one factor.
        losses: one each.
        low: the first rate of the test, for messages.
        high: its last.

    Raises:
        FinetuneBNError: it does not tell.
    """
    if len(losses) < 10:
        allowed = "a rate at which the training does not diverge at once"
        raise FinetuneBNError(complaint("low", low, allowed, f"The loss was not finite at step {len(losses) + 1}."))
    sd = max(1.0, len(rates) / WIDTH)
    smoothed = [_smooth(losses, i, sd) for i in range(len(losses))]
    quiet = max(6, len(losses) // 2)
    noise = math.sqrt(fmean((a - b) ** 2 for a, b in zip(losses[:quiet], smoothed[:quiet], strict=True)))
    error = noise * math.sqrt(2 / (2 * math.sqrt(math.pi) * sd))
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    fallen = max(smoothed[: lowest + 1]) - smoothed[lowest]
    if fallen <= CLEAR * error:
        allowed = "a range in which the loss falls clearly"
        if max(smoothed[lowest:]) - smoothed[lowest] > CLEAR * error:
            raise FinetuneBNError(
                complaint("low", low, allowed, "The loss only rises: begin lower, or take more steps.")
            )
        remedy = (
            f"It falls by {fallen:.2g}, and its noise is {error:.2g}: more steps, larger batches, or a higher `high`."
        )
        raise FinetuneBNError(complaint("steps", len(rates), allowed, remedy))
    bottom = smoothed[lowest] + (1 - NEARLY) * fallen
    lowest = next(i for i, value in enumerate(smoothed) if value <= bottom)
    if lowest >= len(smoothed) - 2 * sd and rates[-1] >= 0.99 * high:
        raise FinetuneBNError(complaint("high", high, "a rate at which the loss no longer falls", "Raise `high`."))
    start = max(range(lowest + 1), key=smoothed.__getitem__)
    slopes = [smoothed[i] - smoothed[i + 1] for i in range(start, lowest)]
    steepest = rates[start + max(range(len(slopes)), key=slopes.__getitem__)]
    lr = float(f"{min(steepest, rates[lowest] / 10):.2g}")
    return LearningRate(arm, lr, steepest, rates[lowest], tuple(rates), tuple(losses), tuple(smoothed))


def _smooth(values: Sequence[float], i: int, sd: float) -> float:
    """Return the mean of the values around number `i`, weighted by a Gaussian; of what there is of them at the ends."""
    reach = math.ceil(3 * sd)
    near = range(max(0, i - reach), min(len(values), i + reach + 1))
    weights = [math.exp(-0.5 * ((k - i) / sd) ** 2) for k in near]
    return sum(w * values[k] for k, w in zip(near, weights, strict=True)) / sum(weights)
