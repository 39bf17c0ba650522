"""Where the policies were before version 0.2: checkpoints have them pickled under this name. Import `finetune_bn`."""

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

__all__ = [
    "EvalNorm",
    "Freeze",
    "FreezeAffine",
    "Ghost",
    "Keep",
    "NormalizeOnly",
    "Policy",
    "Renorm",
    "Rule",
    "Rules",
    "Stochastic",
    "ToGroupNorm",
]
