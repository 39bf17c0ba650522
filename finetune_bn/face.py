"""The public names of the package, grouped by what a user does: add one here, and `finetune_bn.NAME` is there.

`finetune_bn/__init__.py` imports this file when the first of them is asked for, so that what needs none of them (the
help of the command, the list of configs) does not wait for torch.
"""

from finetune_bn.backbones.create import create_backbone
from finetune_bn.backbones.predict import Embedding, Prediction, TrainedModel
from finetune_bn.backbones.saved import load, save
from finetune_bn.comparison.compare import compare
from finetune_bn.comparison.learning_rate import LearningRate, find_learning_rate
from finetune_bn.comparison.result import Comparison
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
from finetune_bn.conversion.private import make_private
from finetune_bn.diagnosis.advise import Advice, advise
from finetune_bn.diagnosis.diagnose import diagnose
from finetune_bn.diagnosis.leakage import Leakage, measure_leakage
from finetune_bn.diagnosis.memory import LayerMemory, MemoryReport, memory_report
from finetune_bn.diagnosis.results import Diagnosis, Finding, LayerDiagnosis
from finetune_bn.diagnosis.status import LayerStatus, Status, status
from finetune_bn.errors import FinetuneBNError
from finetune_bn.group_norm.calibrate import calibrate_group_norm
from finetune_bn.group_norm.distil import Distillation, distil
from finetune_bn.group_norm.record import Calibration, LayerFit
from finetune_bn.metric_learning.pk_sampler import PKBatchSampler
from finetune_bn.metric_learning.resumable_loader import ResumableDataLoader
from finetune_bn.optim.step_limit import limit_steps
from finetune_bn.optim.train_only import Trained, train_only
from finetune_bn.optim.trained_part import apply_trained, remove_trained, save_trained
from finetune_bn.recalibration.bank import StatisticsBank
from finetune_bn.recalibration.recalibrate import recalibrate
from finetune_bn.recalibration.record import LayerRecord, Recalibration

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
    "train_only",
    "make_private",
    "save_trained",
    "apply_trained",
    "remove_trained",
    "PKBatchSampler",
    "ResumableDataLoader",
    # a backbone to begin with, and what was made of it in one file
    "create_backbone",
    "save",
    "load",
    # trying
    "compare",
    "find_learning_rate",
    # looking
    "diagnose",
    "advise",
    "status",
    "memory_report",
    "measure_leakage",
    # what the verbs return
    "Plan",
    "Recalibration",
    "LayerRecord",
    "Calibration",
    "LayerFit",
    "Distillation",
    "Diagnosis",
    "Finding",
    "LayerDiagnosis",
    "Advice",
    "MemoryReport",
    "LayerMemory",
    "Leakage",
    "Status",
    "LayerStatus",
    "TrainedModel",
    "Prediction",
    "Embedding",
    "Trained",
    "Comparison",
    "LearningRate",
    # errors
    "FinetuneBNError",
]
