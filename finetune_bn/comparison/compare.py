"""Compare treatments of BatchNorm by short fine-tunes from the same weights, seeds and order of images."""

from __future__ import annotations

from finetune_bn.comparison.result import ArmResult, Comparison, Run

__all__ = ["ArmResult", "Comparison", "Run"]
