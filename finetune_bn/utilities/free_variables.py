"""The variables that functions find outside of themselves: in closures, and among the globals of their file."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

# A function's helpers are looked into so deep.
_DEEP = 3


def functions_of(model: nn.Module) -> Iterator[Any]:
    """Yield what runs in a forward pass and is not torch's own: methods of the modules' classes, patches and hooks."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    for cls in classes:
        if not _is_of_torch(cls):
            yield from (f for f in vars(cls).values() if isinstance(f, types.FunctionType))
    for module in model.modules():
        yield from (f for f in vars(module).values() if isinstance(f, (types.FunctionType, types.MethodType)))
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            yield from (hook for hook in (getattr(module, kind, None) or {}).values())


def free_variables(functions: Iterable[Any]) -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield (name, holder, key, value) for what the functions read from outside of themselves.

    The holder is a cell, with key None, or a dict of globals.
    """
    seen: set[int] = set()
    waiting = [(function, _DEEP) for function in functions]
    while waiting:
        function, deep = waiting.pop()
        if isinstance(function, functools.partial):
            waiting += [(part, deep) for part in (function.func, *function.args, *function.keywords.values())]
            continue
        function = getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType) or id(function) in seen or _is_of_torch(function):
            continue
        seen.add(id(function))
        found: list[tuple[str, Any, Any, Any]] = []
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if cell != types.CellType():  # an empty one has no contents to read
                found.append((name, cell, None, cell.cell_contents))
        around = function.__globals__
        found += [(name, around, name, around[name]) for name in _names_in(function.__code__) if name in around]
        for each in found:
            if isinstance(each[3], (types.FunctionType, types.MethodType, functools.partial)):
                if deep:
                    waiting.append((each[3], deep - 1))
            else:
                yield each


def _names_in(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return names


def _is_of_torch(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").partition(".")[0] in ("torch", "builtins", "typing")
