"""The command `finetune-bn`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from finetune_bn.cli.entry import main

if TYPE_CHECKING:
    from finetune_bn.cli.commands import FinetuneBNCLI
    from finetune_bn.cli.messages import readable

__all__ = ["FinetuneBNCLI", "main", "readable"]

_LATER = {"FinetuneBNCLI": "commands", "readable": "messages"}


def __getattr__(name: str) -> Any:
    """Import what needs Lightning when it is asked for: the help of the command does not wait for it."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
