"""Lightning callbacks: add them to a `Trainer` that is already there."""

from finetune_bn.callbacks.batch_composition import BatchCompositionGuard
from finetune_bn.callbacks.conversion import BatchNormConversion
from finetune_bn.callbacks.group_norm import GroupNormCalibration, GroupNormDistillation
from finetune_bn.callbacks.monitor import BatchNormMonitor
from finetune_bn.callbacks.recalibration import BatchNormRecalibration
from finetune_bn.callbacks.report import FinetuneReport
from finetune_bn.callbacks.run_state import ResumeWhole
from finetune_bn.callbacks.saved_plan import replay
from finetune_bn.callbacks.schedule import BatchNormSchedule
from finetune_bn.callbacks.step_limit import StepLimit
from finetune_bn.callbacks.train_only import TrainOnly

__all__ = [
    "BatchCompositionGuard",
    "BatchNormConversion",
    "BatchNormMonitor",
    "BatchNormRecalibration",
    "BatchNormSchedule",
    "FinetuneReport",
    "GroupNormCalibration",
    "GroupNormDistillation",
    "ResumeWhole",
    "StepLimit",
    "TrainOnly",
    "replay",
]
