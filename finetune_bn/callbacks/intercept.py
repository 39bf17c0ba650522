"""Run a callback's part before or after a hook of a LightningModule, for as long as the Trainer sets up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

_ENTRIES = "_finetune_bn_entries"
_Entry = tuple[Callable[..., object] | None, Callable[[], object] | None]


def intercept(
    pl_module: pl.LightningModule,
    name: str,
    before: Callable[..., object] | None = None,
    after: Callable[[], object] | None = None,
) -> Callable[[], None]:
    """Let a hook of the module call `before`, with its own arguments, and `after`; return what ends that.

    Several callbacks may do so with one hook, and end it in any order. A hook that the user has set on the module
    itself is there again afterwards.

    Args:
        pl_module: the module.
        name: of the hook.
        before: called first.
        after: called without arguments when the hook has returned.
    """
    own = vars(pl_module).get(name)
    entries: list[_Entry] | None = getattr(own, _ENTRIES, None)
    if entries is None:
        entries = _replace(pl_module, name, own)
    hook: Any = vars(pl_module)[name]
    entry = (before, after)
    entries.append(entry)

    def end() -> None:
        if entry in entries:
            entries.remove(entry)
        if not entries and name in vars(pl_module) and vars(pl_module)[name] is hook:
            hook.put_back()

    return end


def _replace(pl_module: pl.LightningModule, name: str, own: Any) -> list[_Entry]:
    """Put a function in the place of the hook that calls the entries around it; return the list of these."""
    entries: list[_Entry] = []
    original = getattr(pl_module, name)

    def hook(*args: Any, **kwargs: Any) -> Any:
        for before, _ in list(entries):
            if before is not None:
                before(*args, **kwargs)
        result = original(*args, **kwargs)
        for _, after in list(entries):
            if after is not None:
                after()
        return result

    def put_back() -> None:
        vars(pl_module).pop(name, None)
        if own is not None:
            vars(pl_module)[name] = own

    setattr(hook, _ENTRIES, entries)
    hook.put_back = put_back  # type: ignore[attr-defined]
    vars(pl_module)[name] = hook
    return entries
