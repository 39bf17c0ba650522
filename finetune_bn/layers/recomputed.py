"""Forward passes that gradient checkpointing runs twice: the second must see the state of the first, and change none.

A checkpoint runs a part of the network again within backward, to have its activations. A layer that changes what it
normalizes by would see another state by then: its gradients would be those of another function, and it would count the
batch twice. So what a pass started from is remembered, where a checkpoint may come back to it, with a few values of its
input by which the pass is known again.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Drawn = TypeVar("Drawn")
_MOST = 64  # passes that are remembered: micro-batches of an accumulated or pipelined step
_SAME = 1e-2  # kernels that are not deterministic return the input a little different


@dataclass
class Pass:
    """A forward pass in training.

    Attributes:
        state: copies of the tensors it started from, by name.
        key: values of its input.
        shape: shape of its input.
        draws: what it drew at random, in order.
        again: whether it was run again.
    """

    state: dict[str, Tensor]
    key: Tensor
    shape: torch.Size
    draws: list[Any] = field(default_factory=list)
    again: bool = False


class Passes:
    """The forward passes of one layer that may be run again, and which one is running now."""

    def __init__(self) -> None:
        self._known: deque[Pass] = deque(maxlen=_MOST)
        self._now: Pass | None = None
        self._drawn = 0
        self._repeats = False
        self._warned = False

    @property
    def state(self) -> dict[str, Tensor] | None:
        """What the pass that runs again started from; None in a pass that is new."""
        return self._now.state if self._repeats and self._now is not None else None

    @property
    def repeats(self) -> bool:
        """Whether the pass that runs now is run again."""
        return self._repeats

    def begin(self, x: Tensor, state: dict[str, Tensor], layer: str) -> None:
        """Begin a pass in training.

        Args:
            x: its input, [N, C, ...].
            state: the tensors of the layer that it starts from, and may change.
            layer: class name of the layer, for a warning.
        """
        self._now, self._drawn, self._repeats = None, 0, False
        if torch.compiler.is_compiling():
            return  # a compiler recomputes by itself what has no effects
        if torch._C._current_graph_task_id() != -1:
            self._now = self._find(x)
            self._repeats = self._now is not None
            if self._now is None and not self._warned:
                self._warned = True
                warnings.warn(
                    f"{layer}: a forward pass within backward whose input no forward pass had before. It is taken for "
                    "a new batch; if gradient checkpointing runs it again, its input must be the same, random state "
                    "included (preserve_rng_state=True).",
                    stacklevel=4,
                )
        elif _may_come_back():
            self._now = Pass({name: t.detach().clone() for name, t in state.items()}, _key(x), x.shape)
            self._known.append(self._now)

    def draw(self, make: Callable[[], Drawn]) -> Drawn:
        """Return what `make` draws at random, and in a pass that is run again what it drew then."""
        if self._now is None:
            return make()
        if not self._repeats:
            self._now.draws.append(make())
            return self._now.draws[-1]  # type: ignore[no-any-return]
        self._drawn += 1
        return self._now.draws[self._drawn - 1]  # type: ignore[no-any-return]

    def _find(self, x: Tensor) -> Pass | None:
        """Return the pass that had this input: of several the last one that was not run again yet."""
        key = _key(x)
        alike = [known for known in reversed(self._known) if known.shape == x.shape and known.key.dtype == key.dtype]
        for again in (False, True):
            nearest: tuple[float, Pass] | None = None
            for known in (known for known in alike if known.again == again):
                off = _distance(key, known.key)
                if off <= _SAME and (nearest is None or off < nearest[0]):
                    nearest = off, known
                if off == 0:
                    break
            if nearest is not None:
                nearest[1].again = True
                return nearest[1]
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Passes:
        return Passes()

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        return Passes, ()


def _may_come_back() -> bool:
    """Tell whether the pass may lie in a checkpoint: without gradients, or with hooks on what autograd saves."""
    if torch._C._are_functorch_transforms_active():
        return False
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _key(x: Tensor) -> Tensor:
    """Return the values in the middle of some maps, at most [8, 64], in float32 or wider."""
    place: tuple[Any, ...] = (slice(8), slice(64), *(size // 2 for size in x.shape[2:]))
    middle = x.detach()[place]
    return middle.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _distance(a: Tensor, b: Tensor) -> float:
    if torch.equal(a, b):
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny))
