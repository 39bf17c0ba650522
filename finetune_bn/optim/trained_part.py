"""The trained norm tensors and head of a network as one small file, and several of them on one backbone in turn."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import BadData, FinetuneBNError, MissingDependency, complaint
from finetune_bn.optim.parameter_groups import is_norm
from finetune_bn.utilities.files import write_atomically

_KIND = "finetune_bn.trained_part"
_before: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()


def save_trained(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write what was trained of `model` to a safetensors file, for `apply_trained`.

    That is all parameters with `requires_grad`, and, so that the file says all of the function, gamma, beta and
    statistics of each norm layer that has one of them or whose statistics are live. 0.5 MB for ResNet-50's norm layers
    and a head for ten classes.

    Args:
        model: as `train_only` left it, after the training.
        path: of the file; folders are made.

    Returns:
        Its size in bytes.

    Raises:
        FinetuneBNError: the model trains nothing, or the path has another suffix than `.safetensors`.
        MissingDependency: safetensors is not installed.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise FinetuneBNError(complaint("path", str(path), "a path that ends in .safetensors"))
    state = trained_state(model)
    content = _safetensors().save(state, {"format": "pt", "kind": _KIND, "model": type(model).__name__})
    write_atomically(path, content)
    return len(content)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what `save_trained` writes: copies, by their names in the state dict.

    Raises:
        FinetuneBNError: the model trains nothing.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise FinetuneBNError(complaint("model", type(model).__name__, "a model that trains something", "train_only?"))
    whole: set[str] = set()
    for name, module in model.named_modules():
        live = isinstance(module, _BatchNorm) and module.running_mean is not None
        prefix = f"{name}." if name else ""
        if is_norm(module) and (live or any(prefix + own in trained for own in module._parameters)):
            whole.add(prefix)
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
        if name in trained or any(name.startswith(prefix) and "." not in name[len(prefix) :] for prefix in whole)
    }


def apply_trained(model: nn.Module, trained: str | os.PathLike[str] | Mapping[str, Tensor]) -> tuple[str, ...]:
    """Put what `save_trained` wrote onto `model`, a backbone with the weights that the training started from.

    What an earlier call has put there is taken off first, so that several can be applied in turn, each as if it were
    the only one. A linear head takes the number of classes of the file. The layers may be converted in another way than
    those of the network that was trained, or not at all: frozen layers and BatchNorm in eval mode compute the same.

    Args:
        model: with the modules whose names are in the file. Names of a wrapper in front of them (`net.`) do not matter.
        trained: path of the file, or what `trained_state` returned.

    Returns:
        The names in the model of what was put there.

    Raises:
        BadData: the file is damaged, or none that `save_trained` wrote.
        FinetuneBNError: the model has no such tensors, or of other shapes; it is as it was.
    """
    state = dict(trained) if isinstance(trained, Mapping) else _read(Path(trained))
    state = _named_as_in(model, state)
    heads = _resized_heads(model, state)
    own = model.state_dict()
    wrong = [
        f"{name}: {tuple(value.shape)} in the file, {tuple(own[name].shape)} in the model"
        for name, value in state.items()
        if own[name].shape != value.shape and name.rpartition(".")[0] not in heads
    ]
    if wrong:
        allowed = f"tensors of the shapes that this {type(model).__name__} has"
        raise FinetuneBNError(complaint("trained", f"{len(wrong)} others", allowed, "; ".join(wrong[:3])))
    remove_trained(model)
    own = model.state_dict()
    before = {name: own[name].detach().clone() for name in state}
    _put(model, state)
    _before[model] = before
    return tuple(state)


def remove_trained(model: nn.Module) -> bool:
    """Take off what `apply_trained` has put onto `model`: its own tensors are back, bit for bit.

    Returns:
        Whether there was something.
    """
    before = _before.pop(model, None)
    if before is not None:
        _put(model, before)
    return before is not None


def _put(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, module in _resized_heads(model, state).items():
        for own, parameter in list(module.named_parameters(recurse=False)):
            value = state[f"{name}.{own}" if name else own].to(parameter)
            setattr(module, own, nn.Parameter(value, requires_grad=parameter.requires_grad))
        module.out_features = len(module.weight)
    problems = model.load_state_dict(state, strict=False)
    assert not problems.unexpected_keys


def _resized_heads(model: nn.Module, state: dict[str, Tensor]) -> dict[str, nn.Linear]:
    """Return the linear layers all of whose tensors are in the state, with another number of outputs."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        given = {own: state.get(f"{name}.{own}" if name else own) for own, _ in module.named_parameters(recurse=False)}
        weight = given.get("weight")
        if weight is None or any(value is None for value in given.values()):
            continue
        if weight.shape[1:] == module.weight.shape[1:] and len(weight) != len(module.weight):
            found[name] = module
    return found


def _named_as_in(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by the model's names, whatever wrapper is in front of them in the file."""
    own = model.state_dict().keys()
    first = next(iter(state), "")
    for cut in range(first.count(".") + 1):
        prefix = "".join(f"{part}." for part in first.split(".")[:cut])
        if state and all(name.startswith(prefix) and name[len(prefix) :] in own for name in state):
            return {name[len(prefix) :]: value for name, value in state.items()}
    missing = [name for name in state if name not in own]
    allowed = f"what was trained of a {type(model).__name__}"
    remedy = f"Not in it: {', '.join(missing[:3])}. Is this the whole of the model, or a part?"
    raise FinetuneBNError(complaint("trained", f"{len(missing)} of {len(state)} names unknown", allowed, remedy))


def _read(path: Path) -> dict[str, Tensor]:
    load = _safetensors()
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            kind = (file.metadata() or {}).get("kind")
        state: dict[str, Tensor] = load.load_file(path)
    except Exception as error:
        raise BadData(complaint("trained", str(path), "a file that save_trained wrote", str(error))) from error
    if kind != _KIND:
        remedy = "This is another safetensors file, such as a whole network's."
        raise BadData(complaint("trained", str(path), "a file that save_trained wrote", remedy))
    return state


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        remedy = "Run: pip install safetensors"
        raise MissingDependency(complaint("safetensors", "not installed", "0.4.5 and newer", remedy)) from error
    return safetensors.torch
