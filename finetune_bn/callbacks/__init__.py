"""Lightning callbacks: add them to a `Trainer` that is already there."""

from finetune_bn.callbacks.conversion import BatchNormConversion, replay

__all__ = ["BatchNormConversion", "replay"]
