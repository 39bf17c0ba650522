"""How the BatchNorm layers of pretrained backbones are treated when they are fine-tuned.

Plan, convert, revert: plain functions on a `torch.nn.Module` that need torch alone. Lightning callbacks are in
`finetune_bn.callbacks`, tasks in `finetune_bn.tasks`, data modules in `finetune_bn.data`, timm backbones with their
weights in `finetune_bn.backbones`. The public names are listed in `finetune_bn/face.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
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


class _Moved(MetaPathFinder, Loader):
    """Finds the modules that the README of version 0.1 taught; their names are on the face now."""

    names = frozenset(f"{__name__}.{name}" for name in ("samplers", "step_limit", "leakage"))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self.names else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        text = f"{module.__name__} is gone since version 0.2: import its names from {__name__}"
        warnings.warn(text, FutureWarning, stacklevel=2)
        module.__getattr__ = __getattr__  # type: ignore[method-assign]


sys.meta_path.append(_Moved())


def __dir__() -> list[str]:
    face = importlib.import_module("finetune_bn.face")
    return sorted({*globals(), *face.__all__})
