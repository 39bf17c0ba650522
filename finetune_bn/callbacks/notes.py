"""What a recalibration says in a training: warnings once a cause, figures for the logger, one line of the first."""

from __future__ import annotations

import math
import re

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from finetune_bn.recalibration.record import Recalibration


class Notes:
    """Says and logs for one callback.

    Args:
        name: of the callback.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.forget()

    def forget(self) -> None:
        """Begin a new run."""
        self._metrics: dict[str, float] = {}
        self._said: set[str] = set()

    def say(self, text: str) -> None:
        """Warn, once a run for each cause, whatever its numbers are."""
        cause = re.sub(r"[\d.]+", "#", text)
        if cause not in self._said:
            self._said.add(cause)
            rank_zero_warn(f"{self._name}: {text}")

    def take(self, record: Recalibration, suffix: str = "") -> None:
        """Take the figures to be logged; in words those of the first time."""
        if "" not in self._said:
            self._said.add("")
            alone = [f"left alone: {name or '(root)'} {reason}" for name, reason in record.left_alone]
            rank_zero_info("; ".join([f"{self._name}: {str(record).splitlines()[0]}", *alone]))
        values = {"images": record.images, "shift": record.shift, "standard_error": record.standard_error}
        self._metrics |= {f"recalibration/{name}{suffix}": float(v) for name, v in values.items() if math.isfinite(v)}

    def log(self, pl_module: pl.LightningModule, on_step: bool = False) -> None:
        """Log what there is to log; not each hook may."""
        if self._metrics:
            pl_module.log_dict(self._metrics, on_step=on_step, on_epoch=not on_step, batch_size=1, sync_dist=True)
            self._metrics = {}
