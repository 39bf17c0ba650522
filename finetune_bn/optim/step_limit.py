"""Bound how far one optimizer step may move the convolutions of a network whose BatchNorm layers are frozen.

A live BatchNorm layer takes no notice of the size of the weights before it: a step that is too large makes them grow,
and the next ones count for less. Behind a frozen layer nothing does that. Steps that are too large shift the means of
the channels, layer upon layer, until activations saturate and the prediction is a constant. Clipping gradients does not
help with Adam, whose steps do not depend on the size of the gradient; so it is the step that is bounded here, relative
to the weights that it changes (as in You et al. 2017, "Large Batch Training of Convolutional Networks", for the layer,
and in Brock et al. 2021, section 4, for gradients and the unit).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.functional.frozen import at_least_float32

RATIO = 5e-4


def step_factors(old: Tensor, new: Tensor, limit: float, dim: int = 0) -> Tensor:
    """Return the factor, from 0 to 1, by which the step of each channel has to be shortened.

    With it the norm of a channel's step is at most `limit` times the norm of its weights; a channel of zeros stays.

    Args:
        old: weights before the step, of any shape.
        new: weights behind it, of the same shape.
        limit: 0 or more.
        dim: where the channels are.

    Returns:
        Float32 or wider, of the size of `old` along `dim` and 1 elsewhere.
    """
    before = at_least_float32(old)
    others = [d for d in range(old.dim()) if d != dim]
    allowed = limit * torch.linalg.vector_norm(before, dim=others, keepdim=True)
    step = torch.linalg.vector_norm(at_least_float32(new) - before, dim=others, keepdim=True)
    return torch.where(step > allowed, allowed / step, 1.0)


class LimitedSteps:
    """The limit on an optimizer that `limit_steps` has set; `remove` takes it off.

    Attributes:
        ratio: largest step of a channel, as a share of the norm of its weights.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: list[tuple[nn.Parameter, int]], ratio: float) -> None:
        self.ratio = ratio
        self._weights = weights
        self._old: list[Tensor] = []
        self._factors: list[Tensor] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    @property
    def share(self) -> Tensor | None:
        """The share of the channels whose latest step was shortened; None before the first step."""
        if not self._factors:
            return None
        return torch.cat([(factor < 1).flatten().float() for factor in self._factors]).mean()

    def remove(self) -> None:
        """Let the optimizer go on without a limit."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._old = [weight.clone() for weight, _ in self._weights]

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        schedules = {id(p): share_of_peak(group) for group in optimizer.param_groups for p in group["params"]}
        self._factors = []
        for (weight, dim), old in zip(self._weights, self._old, strict=True):
            factors = step_factors(old, weight, self.ratio * schedules.get(id(weight), 1.0), dim)
            shortened = at_least_float32(old).lerp(at_least_float32(weight), factors).to(weight.dtype)
            weight.copy_(torch.where(factors < 1, shortened, weight))  # steps within the limit stay to the last bit
            self._factors.append(factors)
        self._old = []


def limit_steps(optimizer: torch.optim.Optimizer, net: nn.Module, ratio: float = RATIO) -> LimitedSteps:
    """Bound each step of `optimizer` on the convolutions of `net`: at most `ratio` of each output channel's weights.

    The bound follows the schedule of the learning rate: at half of the peak it is half of `ratio`. Below it nothing
    changes, to the last bit. Where the learning rate is too large for frozen layers, the steps are as long as the
    bound says and keep their direction, whatever the learning rate. Any optimizer, AMP and gradient accumulation; the
    weights must not be flattened or sharded (FSDP). For the length of a step it needs a copy of the weights.

    Args:
        optimizer: holds the weights of at least one convolution.
        net: whose convolutions; linear layers, such as the head, and vectors are not bounded.
        ratio: above 0.

    Raises:
        FinetuneBNError: `ratio` is out of range, or the optimizer holds no weight of a convolution of `net`.
    """
    check_ratio(ratio)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    weights = [(weight, dim) for weight, dim in _convolution_weights(net.modules()) if id(weight) in held]
    if not weights:
        allowed = "an optimizer that trains convolutions of net"
        remedy = "Convert and freeze first, then make the optimizer, then limit its steps."
        raise FinetuneBNError(complaint("optimizer", type(optimizer).__name__, allowed, remedy))
    return LimitedSteps(optimizer, weights, ratio)


def share_of_peak(group: dict[str, Any]) -> float:
    """Return the learning rate of a parameter group as a share of its schedule's peak; 1 without a schedule."""
    peak = float(group.get("max_lr", group.get("initial_lr", group["lr"])))
    return min(1.0, float(group["lr"]) / peak) if peak > 0 else 1.0


def check_ratio(ratio: object) -> None:
    """Raise unless `ratio` is a number above 0."""
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 < ratio < math.inf:
        raise FinetuneBNError(complaint("ratio", ratio, "a number above 0", f"{RATIO:g} is usual."))


def _convolution_weights(modules: Iterable[nn.Module]) -> list[tuple[nn.Parameter, int]]:
    """Return the weights of the convolutions, each once, and in which dimension their output channels are."""
    found: dict[int, tuple[nn.Parameter, int]] = {}
    for module in modules:
        if isinstance(module, _ConvNd) and isinstance(module.weight, nn.Parameter):
            found[id(module.weight)] = (module.weight, int(isinstance(module, _ConvTransposeNd)))
    return list(found.values())
