"""Lightning callbacks: add them to a `Trainer` that is already there."""

from finetune_bn.callbacks.conversion import BatchNormConversion, replay
from finetune_bn.callbacks.report import FinetuneReport

__all__ = ["BatchNormConversion", "FinetuneReport", "replay"]
