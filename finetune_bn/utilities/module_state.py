"""What modules keep besides their parameters: remembered, compared, and put back."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from finetune_bn.utilities.free_variables import free_variables, functions_of

# Containers within containers are looked into so deep, and larger ones not at all (their own entries are kept).
_DEEP, _LARGE = 4, 4096
# Tensors with more values are taken for data, which no forward pass of an eval mode writes to.
_VALUES = 1 << 24


class ModuleState:
    """Attributes of all modules of a model, what is in their lists, dicts and sets, and their buffers' values.

    Parameters that are learned, and attributes of other objects that a module holds (a trainer, a data set), are left
    out. With `deep` also the plain values, containers and tensors that its functions and hooks keep in closures and in
    globals; these are put back on request only, for they may be a user's who records what passes.

    Args:
        model: the model.
        functions: others whose closures and globals count.
        deep: also lists and sets, what is in containers within containers, and the values of buffers and of tensors
            among the attributes; else attributes and dicts alone, and which tensors they hold.
    """

    def __init__(self, model: nn.Module, functions: Iterable[Any] = (), *, deep: bool = True) -> None:
        plain = [(n, m) for n, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._modules = [(name, module, dict(vars(module))) for name, module in plain]
        self._contents: dict[int, tuple[str, Any, Any]] = {}
        self._values: dict[int, tuple[str, Tensor, int | None, Tensor]] = {}
        self._deep = deep
        for name, _, attributes in self._modules:
            for key, value in attributes.items():
                self._note(f"{name}.{key}".lstrip("."), value, _DEEP if deep else 0)
        inner = {*self._contents, *self._values}
        self._outside: list[tuple[str, Any, Any, Any]] = []
        for name, holder, key, value in free_variables([*functions_of(model), *functions]) if deep else ():
            if value is None or isinstance(value, (bool, int, float, str, Tensor)) or _is_container(value):
                self._outside.append((name, holder, key, value))
                self._note(name, value, _DEEP)
        self._outer = {*self._contents, *self._values} - inner

    def restore(self, *, outside: bool = False) -> None:
        """Put back what differs; closures and globals too with `outside`."""
        for _, module, attributes in self._modules:
            if _differ(vars(module), attributes):
                vars(module).clear()
                vars(module).update(attributes)
        if outside:
            for _, holder, key, value in self._outside:
                if _read(holder, key) is not value:
                    _write(holder, key, value)
        for key, (_, held, content) in self._contents.items():
            if (outside or key not in self._outer) and _differ(_entries(held), content):
                _fill(held, content)
        for key, (name, tensor, version, value) in list(self._values.items()):
            if (outside or key not in self._outer) and _changed(tensor, version, value):
                with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(value)
                self._values[key] = (name, tensor, _version(tensor), value)

    def changes(self, *, outside: bool = True) -> list[str]:
        """Return the names of what differs now; hooks and `forward` that were put in meanwhile do not count.

        Args:
            outside: also what is kept in closures and globals.
        """
        found = []
        for name, module, attributes in self._modules:
            now = vars(module)
            keys = [k for k in {**attributes, **now} if now.get(k, self) is not attributes.get(k, self)]
            found += [f"{name}.{key}".lstrip(".") for key in keys if key not in ("forward", "training")]
        if outside:
            found += [name for name, holder, key, value in self._outside if _read(holder, key) is not value]
        for place, (name, held, content) in self._contents.items():
            inner = outside or place not in self._outer
            if inner and _differ(_entries(held), content) and "_hooks" not in name:
                found.append(name.removesuffix("._buffers"))
        for place, (name, tensor, version, value) in self._values.items():
            if (outside or place not in self._outer) and _changed(tensor, version, value):
                found.append(name)
        return list(dict.fromkeys(found))

    def _note(self, name: str, value: Any, deep: int) -> None:
        if isinstance(value, Tensor):
            # A parameter without dimensions may be a counter; others are what the network has learned.
            kept = not isinstance(value, nn.Parameter) or not (value.dim() or value.requires_grad)
            if self._deep and kept and not value.is_meta and value.numel() <= _VALUES:
                self._values.setdefault(id(value), (name, value, _version(value), value.detach().clone()))
            return
        kept = _is_container(value) if self._deep else isinstance(value, dict)
        if not kept or id(value) in self._contents:
            return
        content = _entries(value)
        self._contents[id(value)] = (name, value, content)
        if deep and len(content) <= _LARGE:
            inside = content.items() if isinstance(content, dict) else enumerate(content)
            for key, each in inside:
                self._note(f"{name}.{key}".replace("_buffers.", "").replace("_parameters.", ""), each, deep - 1)


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list, set, deque, types.SimpleNamespace))


def _entries(held: Any) -> Any:
    """Return a copy of what a container holds: a dict of it, a set of it, or a list of it."""
    if isinstance(held, types.SimpleNamespace):
        return dict(vars(held))
    if isinstance(held, dict):
        return dict(held)
    return set(held) if isinstance(held, set) else list(held)


def _differ(now: Any, before: Any) -> bool:
    """Whether two copies hold different objects, or the same in another order."""
    if isinstance(now, set):
        return bool(now != before)
    if len(now) != len(before):
        return True
    if isinstance(now, dict):
        return list(now) != list(before) or any(now[key] is not value for key, value in before.items())
    return any(a is not b for a, b in zip(now, before, strict=True))


def _fill(held: Any, content: Any) -> None:
    if isinstance(held, types.SimpleNamespace):
        held = vars(held)
    held.clear()
    if isinstance(held, (dict, set)):
        held.update(content)
    else:
        held.extend(content)


def _read(holder: Any, key: Any) -> Any:
    return holder.cell_contents if key is None else holder.get(key)


def _write(holder: Any, key: Any, value: Any) -> None:
    if key is None:
        holder.cell_contents = value
    else:
        holder[key] = value


def _version(tensor: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None where that is not counted."""
    return None if tensor.is_inference() else tensor._version


def _changed(tensor: Tensor, version: int | None, value: Tensor) -> bool:
    return not torch.equal(tensor, value) if version is None else tensor._version != version
