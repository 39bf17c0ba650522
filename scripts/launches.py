"""Operators that launch work, counted: the package's own count, under the name that the benchmarks use."""

from __future__ import annotations

from finetune_bn.diagnosis.launches import Launches, launches_of

__all__ = ["Launches", "launches_of"]
