"""Which batch fits in a GPU's memory: computed from what a training step keeps for backward, not measured."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from finetune_bn.diagnosis.memory import MemoryReport
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.checks import number

# Of the device's memory, for its context, the libraries' workspaces and what the allocator cannot use.
HEADROOM = 0.1
MEMORIES_GIB = (8.0, 16.0, 24.0)
ADAMW = 2.0  # numbers that it keeps for each trained one
_LARGEST = 1 << 20  # images: who needs more has no trouble with memory


@dataclass(frozen=True)
class StepMemory:
    """What a training step has in memory at its peak, as far as it can be computed, in bytes.

    Attributes:
        kept: what autograd keeps for backward, (batch, bytes) of at least one batch size, ascending. Between and beyond
            them a straight line is taken; with one alone all of it is taken to grow with the batch.
        working: for each image, the gradients that are passed from layer to layer: twice the largest activation.
        weights: parameters and buffers.
        gradients: of the trained parameters.
        optimizer: what the optimizer keeps.
        most_fixed: at most so much of what is kept does not grow with the batch; None: not known. A layer may begin to
            keep less from some batch on (a learnable scale that shares backward passes): where the last three batches
            are on no line, nothing is taken to stay beyond the largest of them. So count three where layers do that.
    """

    kept: tuple[tuple[int, int], ...]
    working: int
    weights: int
    gradients: int
    optimizer: int
    most_fixed: int | None = None

    def kept_for(self, batch: int) -> float:
        """Return the bytes that are kept for the backward pass of a batch."""
        if len(self.kept) == 1:
            return self.kept[0][1] * batch / self.kept[0][0]
        pairs = list(zip(self.kept, self.kept[1:], strict=False))
        (one, low), (two, high) = next((pair for pair in pairs if batch <= pair[1][0]), pairs[-1])
        slope = (high - low) / (two - one)
        if batch <= two or self.most_fixed is None:
            return max(low + slope * (batch - one), 0.0)
        fixed = self.most_fixed
        if len(pairs) > 1:
            (zero, lowest), _ = pairs[-2]
            before = (low - lowest) / (one - zero)
            fixed = fixed if abs(before - slope) <= 0.02 * abs(slope) else 0  # no line: nothing is known to stay
        return high + (batch - two) * max(slope, (high - fixed) / two)

    def peak(self, batch: int) -> int:
        """Return the bytes of a step of this batch: those of backward, or of the optimizer's step where they are more.

        An optimizer that works on all weights at once (foreach) makes one copy of the gradients.
        """
        backward = self.kept_for(batch) + self.working * batch
        return int(self.weights + self.optimizer + self.gradients + max(backward, self.gradients))

    def largest_batch(self, gib: float, headroom: float = HEADROOM) -> int:
        """Return the largest batch of a step that fits in `gib` GiB; 0 where not even one image does.

        Args:
            gib: memory of the device, GiB (2^30 bytes).
            headroom: the part of it that is left free.

        Raises:
            FinetuneBNError: an argument is out of its bounds.
        """
        room = number("gib", gib, above=0) * 2**30 * (1 - number("headroom", headroom, least=0, below=1))
        good, bad = 0, 1
        while bad < _LARGEST and self.peak(bad) <= room:
            good, bad = bad, 2 * bad
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if self.peak(middle) <= room else (good, middle)
        return good

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self) | {"kept": [list(pair) for pair in self.kept]}


def step_memory(
    model: nn.Module, reports: MemoryReport | Sequence[MemoryReport], *, after: bool = True, state: float = ADAMW
) -> StepMemory:
    """Return what a training step has in memory, from one memory report or from several of different batch sizes.

    With two the part that does not grow with the batch (autocast's copies of the weights) is told from the rest.

    Args:
        model: the model of the reports; its sizes are read, and which parameters are trained.
        reports: what `memory_report` returned.
        after: under the policy of the reports; False: as the model is. Without a policy both are the same.
        state: how many numbers the optimizer keeps for each trained one: 2 for AdamW, see `state_per_weight`.

    Raises:
        FinetuneBNError: there is no report, two are of one batch size, or one names no batch.
    """
    given = [reports] if isinstance(reports, MemoryReport) else list(reports)
    batches = [_batch(report) for report in given]
    if not given or len(set(batches)) < len(batches):
        raise FinetuneBNError(complaint("reports", batches, "memory reports of different batch sizes, at least one"))
    number("state", state, least=0)
    totals = [report.before if report.after is None or not after else report.after for report in given]
    # A layer keeps what goes into it, so that the largest of them tells how large an activation is. What the model
    # itself keeps is of many operations.
    largest = [
        max((row.before for row in r.layers if row.name), default=0) / b for r, b in zip(given, batches, strict=True)
    ]
    trained = {id(p): p.nbytes for p in model.parameters() if p.requires_grad}
    gradients = sum(trained.values())
    return StepMemory(
        kept=tuple(sorted(zip(batches, totals, strict=True))),
        working=int(2 * max(largest)),
        weights=sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        gradients=gradients,
        optimizer=int(state * gradients),
        # Autocast's copies of the weights; in one precision what is kept is made of the images.
        most_fixed=0 if given[0].autocast is None else gradients // 2,
    )


def largest_batches(
    memory: StepMemory, gib: Iterable[float] = MEMORIES_GIB, headroom: float = HEADROOM
) -> tuple[tuple[float, int], ...]:
    """Return for each device's memory in GiB the largest batch that fits, as `PolicyMemory.largest_batch` holds it."""
    return tuple((float(size), memory.largest_batch(size, headroom)) for size in gib)


def state_per_weight(optimizer: torch.optim.Optimizer) -> float:
    """Return how many numbers an optimizer keeps for each trained one, found out by a step of a small matrix.

    The optimizer stays as it is. One that keeps less for large matrices than for small ones (Adafactor) is told by a
    matrix of 256 x 256.
    """
    weight = nn.Parameter(torch.ones(256, 256))
    weight.grad = torch.ones_like(weight)
    probe = copy.copy(optimizer)
    probe.state = collections.defaultdict(dict)
    probe.param_groups = [{**optimizer.param_groups[0], "params": [weight]}]
    # What others put around the step is not asked.
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(probe, hooks, collections.OrderedDict())
    type(probe).step(probe)
    tensors = [leaf for leaf in tree_leaves(dict(probe.state)) if isinstance(leaf, torch.Tensor)]
    return sum(t.nbytes for t in tensors if t is not weight and t.dim()) / weight.nbytes


def _batch(report: MemoryReport) -> int:
    shape = report.inputs[0] if report.inputs else ()
    if not shape or shape[0] < 1:
        raise FinetuneBNError(complaint("reports", report.inputs, "a report whose first input has a batch of images"))
    return shape[0]
