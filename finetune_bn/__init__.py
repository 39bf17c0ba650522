"""How the BatchNorm layers of pretrained backbones are treated when they are fine-tuned.

Plan, convert, revert: plain functions on a `torch.nn.Module` that need torch alone. Lightning callbacks are in
`finetune_bn.callbacks`, tasks in `finetune_bn.tasks`, data modules in `finetune_bn.data`, timm backbones with their
weights in `finetune_bn.backbones`.
"""

from finetune_bn.banks import StatisticsBank
from finetune_bn.calibrate import calibrate_group_norm
from finetune_bn.calibration_record import Calibration, LayerFit
from finetune_bn.convert import convert, revert
from finetune_bn.distil import Distillation, distil
from finetune_bn.errors import FinetuneBNError
from finetune_bn.memory import LayerMemory, MemoryReport, memory_report
from finetune_bn.merging import fold
from finetune_bn.plans import Plan, plan
from finetune_bn.policies import (
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
from finetune_bn.recalibrate import recalibrate
from finetune_bn.recalibration_record import LayerRecord, Recalibration

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Distillation",
    "EvalNorm",
    "FinetuneBNError",
    "Freeze",
    "FreezeAffine",
    "Ghost",
    "Keep",
    "LayerFit",
    "LayerMemory",
    "LayerRecord",
    "MemoryReport",
    "NormalizeOnly",
    "Plan",
    "Policy",
    "Recalibration",
    "Renorm",
    "Rule",
    "Rules",
    "StatisticsBank",
    "Stochastic",
    "ToGroupNorm",
    "calibrate_group_norm",
    "convert",
    "distil",
    "fold",
    "memory_report",
    "plan",
    "recalibrate",
    "revert",
]
