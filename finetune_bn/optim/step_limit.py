"""Bound how far one optimizer step may move the convolutions of a network whose BatchNorm layers are frozen.

A live BatchNorm layer takes no notice of the size of the weights before it: a step that is too large makes them grow,
and the next ones count for less. Behind a frozen layer nothing does that. Steps that are too large shift the means of
the channels, layer upon layer, until activations saturate and the prediction is a constant. Clipping gradients does not
help with Adam, whose steps do not depend on the size of the gradient; so it is the step that is bounded here, relative
to the weights that it changes (as in You et al. 2017, "Large Batch Training of Convolutional Networks", for the layer,
and in Brock et al. 2021, section 4, for gradients and the unit).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.functional.frozen import at_least_float32
from finetune_bn.optim.frozen_behind import frozen_behind
from finetune_bn.optim.step_buckets import Bucket, Limit, share_of, step_factors
from finetune_bn.utilities.checks import number
from finetune_bn.utilities.probe import check_whole

__all__ = ["FLOOR", "RATIO", "LimitedSteps", "check_ratio", "limit_steps", "share_of_peak", "step_factors"]

log = logging.getLogger("finetune_bn")

RATIO = 5e-4
# Pretrained channels have norms about 1, dead ones about 0. Behind a dead one a frozen layer multiplies by 1/sqrt(eps):
# by this floor it moves, in units of that layer's output, about as fast as the others.
FLOOR = 1e-2


class LimitedSteps:
    """The limit on an optimizer that `limit_steps` has set; `remove` takes it off.

    Attributes:
        ratio: largest step of a channel, as a share of the norm of its weights.
        floor: the norm that a channel of smaller weights counts with.
        limited: names of the convolutions whose steps are bounded.
        free: names of those that the optimizer trains and that are not: no frozen layer is behind them, their weights
            were all zero at the start, or are computed from others (parametrized).
        summary: these two in a sentence, with how that was found out.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        net: nn.Module,
        ratio: float,
        floor: float = FLOOR,
        example_input: Any = None,
        say: Callable[[str], object] = log.info,
        warn: Callable[[str], object] = log.warning,
        new: frozenset[str] = frozenset(),
    ) -> None:
        self.ratio, self.floor = ratio, floor
        self.limited: tuple[str, ...] = ()
        self.free: tuple[str, ...] = ()
        self.new = new
        self._net, self._example_input, self._say, self._warn = net, example_input, say, warn
        self._buckets: list[Bucket] = []
        self._held: tuple[int, ...] = ()
        self._stepped = False
        optimizer = _hookable(optimizer)
        self.look_again(optimizer)
        self._handles = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    @property
    def share(self) -> Tensor | None:
        """The share of the bounded channels whose latest step was shortened; None before the first step."""
        return share_of(self._buckets) if self._stepped else None

    @property
    def summary(self) -> str:
        """What is bounded, and how that was found out."""
        of = len(self.limited) + len(self.free)
        if not of:
            return "steps are not bounded: the optimizer trains no convolution yet"
        shown = ", ".join(self.free[:4]) + (", ..." if len(self.free) > 4 else "")
        if not self.limited:
            return f"no step is bounded: no frozen layer is behind the {of} convolutions that are trained ({shown})"
        reasons = "as no frozen layer is behind them, they start at zero, or their weights are computed from others"
        why = f"; not bounded, {reasons}: {shown}" if self.free else ""
        return (
            f"steps of {len(self.limited)} of the {of} convolutions that the optimizer trains are bounded ({self._how})"
            f"{why}"
        )

    def remove(self) -> None:
        """Let the optimizer go on without a limit."""
        for handle in self._handles:
            handle.remove()

    def look_again(self, optimizer: torch.optim.Optimizer) -> None:
        """Find anew which convolutions are bounded: for a network whose layers or trained parts were changed.

        Parameter groups that are added to the optimizer are seen without it.
        """
        self._held = _sizes(optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        convolutions: dict[int, tuple[str, nn.Parameter, int]] = {}
        computed: list[str] = []  # weights that are made of others, as by torch.nn.utils.parametrize
        for name, module in self._net.named_modules():
            if not isinstance(module, _ConvNd):
                continue
            weight = module._parameters.get("weight")
            if weight is not None and id(weight) in held:
                dim = int(isinstance(module, _ConvTransposeNd))
                convolutions.setdefault(id(weight), (name, weight, dim))
            elif weight is None and any(id(p) in held for p in module.parameters()):
                computed.append(name)
        behind = frozen_behind(self._net, self._example_input) if convolutions else None
        names = behind.names if behind is not None else frozenset[str]()
        self._how = behind.how if behind is not None else ""
        known = {*self.limited, *self.free}
        followed = [c for c in convolutions.values() if c[0] in names]
        zero = {name for name, weight, _ in followed if name not in known and not bool(weight.detach().any())}
        self.new |= zero  # no statistics were ever measured behind such a convolution: it was put there to be learned
        limited = [c for c in followed if c[0] not in self.new]
        before = self.limited, self.free
        self.limited = tuple(name for name, _, _ in limited)
        free = [name for name, _, _ in convolutions.values() if name not in set(self.limited)]
        self.free = (*free, *computed)
        self._buckets = Bucket.sort([(weight, dim) for _, weight, dim in limited])
        if before != (self.limited, self.free) or not convolutions:
            say = self._warn if self.free and not self.limited else self._say
            say(f"StepLimit: {self.summary}.")
            log.debug("bounded: %s; not bounded: %s", ", ".join(self.limited), ", ".join(self.free))

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        if self._held != _sizes(optimizer):
            self.look_again(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None or not _steps_after_one_closure(optimizer):
            self._remember()
            return None

        # Lightning's closure is the forward and backward pass: a copy taken before it would lie beside its activations.
        def then_remember() -> Any:
            loss = closure()
            with torch.no_grad():
                self._remember()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": then_remember}
        return (args[0], then_remember, *args[2:]), kwargs

    def _remember(self) -> None:
        for bucket in self._buckets:
            bucket.remember()

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = True
        limits: dict[int, Limit] = {}
        for group in optimizer.param_groups:
            limits |= dict.fromkeys(map(id, group["params"]), self.ratio * share_of_peak(group))
        for bucket in self._buckets:
            bucket.shorten([limits.get(id(weight), self.ratio) for weight in bucket.weights], self.floor)


def limit_steps(
    optimizer: torch.optim.Optimizer,
    net: nn.Module,
    ratio: float = RATIO,
    *,
    floor: float = FLOOR,
    example_input: Any = None,
) -> LimitedSteps:
    """Bound each step of `optimizer` on the convolutions of `net` that have a frozen BatchNorm layer behind them.

    An output channel moves by at most `ratio` of the norm of its weights in a step. The bound follows the schedule of
    the learning rate: at half of the peak it is half of `ratio`. Below it nothing changes, to the last bit. Where the
    learning rate is too large for frozen layers, the steps are as long as the bound says and keep their direction,
    whatever the learning rate. Any optimizer, AMP and gradient accumulation; the weights must not be flattened or
    sharded (FSDP). During a step it holds two copies of those weights.

    Not bounded are heads, adapters such as LoRA's, decoders that were not pretrained, convolutions without a frozen
    layer behind or that start at zero, linear layers and vectors. The log (`finetune_bn`, level INFO; a warning
    where there is nothing to bound) and the attributes of what is returned say which are. Parameter groups that are
    added later are bounded too.

    Args:
        optimizer: holds parameters of `net`.
        net: with its layers frozen already.
        ratio: above 0.
        floor: above 0. A channel whose weights have a smaller norm counts with this one, so that it can be learned.
        example_input: a tensor, tuple or dict that `net.forward` takes, to find out which convolutions have a frozen
            layer behind. Not needed for timm models; without one the order decides in which modules are defined.

    Raises:
        FinetuneBNError: `ratio` or `floor` is out of range, the optimizer holds no parameter of `net`, or `net` is
            sharded by FSDP.
    """
    check_ratio(ratio)
    number("floor", floor, above=0, below=float("inf"))
    check_whole(net)
    own = {id(p) for p in net.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        allowed = "an optimizer that holds parameters of net"
        remedy = "Convert and freeze first, then make the optimizer, then limit its steps."
        raise FinetuneBNError(complaint("optimizer", type(optimizer).__name__, allowed, remedy))
    return LimitedSteps(optimizer, net, ratio, floor, example_input)


def share_of_peak(group: dict[str, Any]) -> Limit:
    """Return the learning rate of a parameter group as a share of its schedule's peak; 1 without a schedule.

    A tensor where the learning rate is one (`capturable`): nothing waits for its value.
    """
    lr, peak = group["lr"], group.get("max_lr", group.get("initial_lr", group["lr"]))
    if torch.is_tensor(lr) or torch.is_tensor(peak):
        share = at_least_float32(torch.as_tensor(lr) / torch.as_tensor(peak)).clamp(max=1.0)
        return torch.where(torch.isnan(share), 1.0, share)
    return min(1.0, float(lr) / float(peak)) if peak > 0 else 1.0


def check_ratio(ratio: object) -> None:
    """Raise unless `ratio` is a number above 0."""
    number("ratio", ratio, above=0, below=float("inf"))


def _hookable(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer inside of a wrapper that calls itself one and has no hooks, such as accelerate's."""
    if hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return optimizer
    for name in ("optimizer", "original_optimizer", "base_optimizer"):  # accelerate's, opacus', other people's
        inner = getattr(optimizer, name, None)
        if isinstance(inner, torch.optim.Optimizer):
            return _hookable(inner)
    allowed = "an optimizer with step hooks, as every torch.optim.Optimizer has that calls its parent's __init__"
    raise FinetuneBNError(complaint("optimizer", type(optimizer).__name__, allowed, "Pass the one that it wraps."))


def _sizes(optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
    return tuple(len(group["params"]) for group in optimizer.param_groups)


def _steps_after_one_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether `step` calls its closure once, before it touches a weight: torch's own do, but for LBFGS."""
    kind = type(optimizer)
    return kind.__module__.startswith("torch.optim.") and kind is not torch.optim.LBFGS
