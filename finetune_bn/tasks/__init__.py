"""What is learned: Lightning modules around a timm network, with their optimizer, schedule and metrics."""

from finetune_bn.tasks.base import TimmTask
from finetune_bn.tasks.classification import ImageClassification
from finetune_bn.tasks.metric_learning import MetricLearning

__all__ = ["ImageClassification", "MetricLearning", "TimmTask"]
