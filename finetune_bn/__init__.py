"""How the BatchNorm layers of pretrained backbones are treated when they are fine-tuned.

Plan, convert, revert: plain functions on a `torch.nn.Module` that need torch alone. Lightning callbacks are in
`finetune_bn.callbacks`, tasks in `finetune_bn.tasks`, data modules in `finetune_bn.data`, timm backbones with their
weights in `finetune_bn.backbones`.
"""

from finetune_bn.conversion.convert import convert, revert
from finetune_bn.conversion.export import export
from finetune_bn.conversion.merge import fold
from finetune_bn.conversion.plan import Plan, plan
from finetune_bn.conversion.policies import (
    EvalNorm,
    Freeze,
    FreezeAffine,
    Ghost,
    Keep,
    NormalizeOnly,
    Policy,
    Renorm,
    Rule,
    Rules,
    Stochastic,
    ToGroupNorm,
)
from finetune_bn.diagnosis.leakage import Leakage, measure_leakage
from finetune_bn.diagnosis.memory import LayerMemory, MemoryReport, memory_report
from finetune_bn.errors import FinetuneBNError
from finetune_bn.group_norm.calibrate import calibrate_group_norm
from finetune_bn.group_norm.distil import Distillation, distil
from finetune_bn.group_norm.record import Calibration, LayerFit
from finetune_bn.metric_learning.pk_sampler import PKBatchSampler, ResumableDataLoader
from finetune_bn.optim.step_limit import limit_steps
from finetune_bn.recalibration.bank import StatisticsBank
from finetune_bn.recalibration.recalibrate import recalibrate
from finetune_bn.recalibration.record import LayerRecord, Recalibration

__version__ = "0.2.0"

__all__ = [
    # look before, do, undo, do for good
    "plan",
    "convert",
    "revert",
    "fold",
    "export",
    # what may happen to a layer
    "Policy",
    "Rule",
    "Rules",
    "Keep",
    "Freeze",
    "FreezeAffine",
    "NormalizeOnly",
    "ToGroupNorm",
    "Ghost",
    "Renorm",
    "Stochastic",
    "EvalNorm",
    # statistics of the target data
    "recalibrate",
    "StatisticsBank",
    # what GroupNorm needs
    "calibrate_group_norm",
    "distil",
    # training
    "limit_steps",
    "PKBatchSampler",
    "ResumableDataLoader",
    # looking
    "memory_report",
    "measure_leakage",
    # what the verbs return
    "Plan",
    "Recalibration",
    "LayerRecord",
    "Calibration",
    "LayerFit",
    "Distillation",
    "MemoryReport",
    "LayerMemory",
    "Leakage",
    # errors
    "FinetuneBNError",
]
