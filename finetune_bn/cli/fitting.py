"""What `plan --memory true --batch_size auto` says: the largest batch that fits, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from finetune_bn.diagnosis.fits import (
    ADAMW,
    HEADROOM,
    MEMORIES_GIB,
    StepMemory,
    largest_batches,
    state_per_weight,
    step_memory,
)
from finetune_bn.diagnosis.memory import MemoryReport
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.checks import number
from finetune_bn.utilities.tables import text_table

COUNTED = (4, 8, 16)  # the batches whose bytes are counted; of others a straight line through them is taken


@dataclass(frozen=True)
class Fitting:
    """The largest batches, computed.

    Attributes:
        before: what a step has in memory, the layers as they are.
        after: the same under the policy.
        state: how many numbers the optimizer keeps for each trained one.
        gib: memory of the devices, GiB.
    """

    before: StepMemory
    after: StepMemory
    state: float
    gib: tuple[float, ...]

    @classmethod
    def of(cls, model: nn.Module, reports: Sequence[MemoryReport], state: float, gib: tuple[float, ...]) -> Fitting:
        """Return it from reports of different batch sizes."""
        before, after = (step_memory(model, reports, after=which, state=state) for which in (False, True))
        return cls(before, after, state, gib)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data; the batch that was chosen is the one of the smallest device."""
        largest = [
            {"gib": gib, "before": before, "after": after}
            for (gib, before), (_, after) in zip(
                *(largest_batches(m, self.gib) for m in (self.before, self.after)), strict=True
            )
        ]
        parts = {"before": self.before.to_dict(), "after": self.after.to_dict()}
        return {
            "computed": True,
            "headroom": HEADROOM,
            "optimizer_state": self.state,
            "batch_size": largest[0]["after"],
            "largest_batch": largest,
            **parts,
        }

    def __str__(self) -> str:
        found = self.to_dict()
        rows = [(f"{row['gib']:g}", f"{row['before']:,}", f"{row['after']:,}") for row in found["largest_batch"]]
        lines = [
            f"Largest batch, computed and not measured: {HEADROOM:.0%} of the memory left free, the optimizer keeps "
            f"{self.state:g} numbers for each weight.",
            *text_table(("GiB", "before", "after"), rows, right=(0, 1, 2)),
        ]
        chosen = found["batch_size"]
        gib = f"{self.gib[0]:g} GiB"
        if chosen:
            lines.append(f"Chosen: {chosen}, which fits in {gib}: --data.batch_size {chosen}")
        else:
            lines.append(f"Chosen: none, not one image fits in {gib}.")
        return "\n".join(lines)


def gib_of(given: Sequence[float] | float | str | None) -> tuple[float, ...]:
    """Return the devices' memory in GiB, ascending, from a number, a list or `8,16,24`; None: the GPU that is here.

    Raises:
        FinetuneBNError: these are no numbers above 0.
    """
    if given is None:
        if torch.cuda.is_available():
            return (torch.cuda.get_device_properties(0).total_memory / 2**30,)
        return MEMORIES_GIB
    parts: list[Any] = (
        given.split(",") if isinstance(given, str) else [given] if isinstance(given, float | int) else [*given]
    )
    try:
        sizes = {float(number("memory_gib", float(part), above=0)) for part in parts}
    except (TypeError, ValueError) as error:
        raise FinetuneBNError(complaint("memory_gib", given, "numbers above 0, such as 8,16,24")) from error
    if not sizes:
        raise FinetuneBNError(complaint("memory_gib", given, "numbers above 0, such as 8,16,24"))
    return tuple(sorted(sizes))


def state_of(model: pl.LightningModule) -> float:
    """Return how many numbers the optimizer of a task keeps for each trained one; AdamW's 2 where that is not known."""
    name = getattr(model, "optimizer_name", None)
    if not isinstance(name, str):
        return ADAMW
    try:
        return state_per_weight(create_optimizer_v2([nn.Parameter(torch.ones(2, 2))], opt=name, lr=1e-3))
    except Exception:  # one that wants more than a gradient, such as a closure
        return ADAMW
