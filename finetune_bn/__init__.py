"""How the BatchNorm layers of pretrained backbones are treated when they are fine-tuned.

Plan, convert, revert: plain functions on a `torch.nn.Module` that need torch alone. Lightning callbacks are in
`finetune_bn.callbacks`, tasks in `finetune_bn.tasks`, data modules in `finetune_bn.data`, timm backbones with their
weights in `finetune_bn.backbones`. The public names are listed in `finetune_bn/face.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune_bn.face import *  # noqa: F403

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Return a folder of the package, or a public name; torch is imported when the first of these is asked for."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    face = importlib.import_module("finetune_bn.face")
    if name not in (*face.__all__, "__all__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(face, name)
    return value


def __dir__() -> list[str]:
    face = importlib.import_module("finetune_bn.face")
    return sorted({*globals(), *face.__all__})
