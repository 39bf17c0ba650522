"""`diagnose`: what a model, its data and its batches are like, before anything is trained."""

from __future__ import annotations

from finetune_bn.diagnosis.results import (
    BatchDiagnosis,
    Curvature,
    Diagnosis,
    Finding,
    LayerDiagnosis,
    PolicyMemory,
)

__all__ = ["BatchDiagnosis", "Curvature", "Diagnosis", "Finding", "LayerDiagnosis", "PolicyMemory"]
