"""Weights read safely from a file, brought to timm's names, and loaded strictly into a network."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_bn.conversion.policies import CLASSES
from finetune_bn.errors import BadData, FinetuneBNError, MissingDependency, complaint

_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")
_KINDS = (
    f"'pretrained' (hub weights), 'package', 'package:NAME', None (random), or a local file ({', '.join(_SUFFIXES)})"
)
# In this order: where a training script stored averaged weights beside the raw ones, timm takes the average as well.
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")


def import_timm() -> Any:
    """Return the module timm, or raise `MissingDependency` where it is not installed."""
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise MissingDependency(
            complaint("timm", "not installed", "timm 1.0.15 and newer", "Run: pip install timm")
        ) from error
    return timm


def check_path(weights: object) -> Path:
    """Return `weights` as the path of a file, or raise `FinetuneBNError` with all that is allowed instead."""
    if not isinstance(weights, (str, os.PathLike)):
        raise FinetuneBNError(complaint("weights", weights, _KINDS))
    path = Path(weights).expanduser()
    if not path.is_file():
        raise FinetuneBNError(complaint("weights", str(weights), _KINDS, "There is no such file."))
    if path.suffix not in _SUFFIXES:
        raise FinetuneBNError(complaint("weights", str(weights), _KINDS, f"Its suffix is {path.suffix!r}."))
    return path


def load_safely(path: Path) -> Any:
    """Return what a file of weights or a checkpoint holds, on the CPU; Python objects in it are not loaded.

    Raises:
        MissingDependency: safetensors is needed for it, and not installed.
        BadData: it is damaged, or holds Python objects.
    """
    # Plain data that checkpoints carry beside the tensors: the options of timm's script, and our own policies.
    before = [(policy, f"finetune_bn.policies.{policy.__name__}") for policy in CLASSES]  # version 0.2
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace, *CLASSES, *before]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        remedy = "Run: pip install safetensors"
        raise MissingDependency(complaint("weights", str(path), "a package that can read it", remedy)) from error
    except Exception as error:  # torch.load raises whatever broken bytes lead it to
        allowed = "a readable file with nothing but weights"
        raise BadData(complaint("weights", str(path), allowed, _why(path, error))) from error


def read_file(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file, out of the containers that training scripts put around it.

    Raises:
        MissingDependency: safetensors is needed for it, and not installed.
        BadData: it is damaged, holds no state dict, or Python objects, which are not loaded.
    """
    found: Any = load_safely(path)
    while isinstance(found, Mapping):
        inner = next((key for key in _CONTAINERS if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = found[inner]
    if not isinstance(found, Mapping) or not found or not all(torch.is_tensor(v) for v in found.values()):
        keys = list(found)[:5] if isinstance(found, Mapping) else type(found).__name__
        allowed = f"a state dict (names and tensors), bare or under {', '.join(_CONTAINERS)}"
        raise BadData(complaint("weights", str(path), allowed, f"It holds {keys}."))
    return {str(key): value for key, value in found.items()}


def _why(path: Path, error: Exception) -> str:
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not an archive of torch.save
        foreign = []
    if foreign:
        remedy = "torch.save(model.state_dict(), ...) writes a file without them."
        return f"It holds Python objects, which are not loaded ({', '.join(foreign[:3])}). {remedy}"
    # What PyTorch adds behind "In PyTorch 2.6" is the advice to run any code that the file may hold.
    first = str(error).strip().partition("\n")[0].partition(" In PyTorch")[0]
    return f"It is damaged or of another kind ({type(error).__name__}: {first[:200]})."


def load_strictly(
    net: Any, state: Mapping[str, Tensor], origin: str, num_classes: int | None, tell: Callable[[str], Any]
) -> bool:
    """Load strictly, after the differences that `create_backbone` allows are settled and told of.

    Args:
        net: a timm model.
        state: its weights, under timm's names or those of the architecture's first publication, with any prefix.
        origin: what errors call the place that they are from.
        num_classes: the number that the caller asked for; None leaves no other head than that of the weights.
        tell: called with each difference that was settled, a sentence.

    Returns:
        Whether the head is a new, random one.

    Raises:
        BadData: they do not fit; what is missing, unexpected, of another shape or broken is counted and named.
    """
    reported: dict[str, list[str]] = {}
    for convention in (lambda s: s, lambda s: _original_names(net, s)):
        notes: list[str] = []
        ready = _settle(net, convention(_inside(net, state, origin, notes)), num_classes, notes)
        found = faults(net.state_dict(), ready)
        if not found:
            net.load_state_dict(ready, strict=True)
            for note in notes:
                tell(f"{origin}: {note}")
            return any("random, since num_classes=" in note for note in notes)
        reported = reported or found
    parts = "; ".join(f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in reported.items())
    allowed = f"the {len(net.state_dict())} tensors of {net.pretrained_cfg['architecture']} ({net.num_classes} classes)"
    remedy = "Check the model's name and num_classes; a number given there replaces a head of another size."
    raise BadData(complaint("weights", origin, allowed, f"There are {parts}. {remedy}"))


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3] + ["..."] * (len(keys) > 3))


def _heads(net: Any) -> tuple[str, ...]:
    """Return what the names of the head's tensors begin with, also where the head is gone."""
    names = net.pretrained_cfg.get("classifier") or ()
    prefixes = []
    for name in (names,) if isinstance(names, str) else names:
        # Without classes levit and its like lose the BatchNorm in front of the classifier as well.
        parent = name.rpartition(".")[0]
        gone = parent and not any(key.startswith(f"{parent}.") for key in net.state_dict())
        prefixes.append(f"{parent if gone else name}.")
    return tuple(prefixes)


def _body(net: Any, keys: Any) -> set[str]:
    heads = _heads(net)
    return {key for key in keys if not key.startswith(heads) and not key.endswith("num_batches_tracked")}


def _inside(net: Any, state: Mapping[str, Tensor], origin: str, notes: list[str]) -> dict[str, Tensor]:
    """Return the part of a state dict that is this network, without the prefix that a module around it added."""
    wanted = _body(net, net.state_dict())
    landmark = min(wanted)
    prefixes = ["", *sorted({key[: -len(landmark)] for key in state if key.endswith(f".{landmark}")})]
    hits = {p: len(wanted & {key[len(p) :] for key in state if key.startswith(p)}) for p in prefixes}
    whole = [p for p in prefixes if hits[p] == len(wanted)]
    if len(whole) > 1 and whole[0]:
        allowed = "a checkpoint with this network once"
        raise BadData(complaint("weights", origin, allowed, f"It is there under {', '.join(whole)}: save one of them."))
    prefix = whole[0] if whole else max(prefixes, key=hits.__getitem__)
    outside = [key for key in state if not key.startswith(prefix)]
    if outside:
        notes.append(f"{len(outside)} tensors outside of '{prefix}' left out: {_some(outside)}.")
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _original_names(net: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as timm itself would rename and resize those of the architecture's first publication."""
    entry = import_timm().model_entrypoint(net.pretrained_cfg["architecture"])
    convention = getattr(sys.modules[entry.__module__], "checkpoint_filter_fn", None)
    try:
        renamed = state if convention is None else convention(dict(state), net)
    except Exception:  # made for one kind of file, it may do anything to another; the strict check then speaks
        return state
    return renamed if isinstance(renamed, dict) else state


def _settle(net: Any, state: dict[str, Tensor], num_classes: int | None, notes: list[str]) -> dict[str, Tensor]:
    """Settle a head for other classes and a stem for other channels, where the caller asked for them."""
    wanted, heads = net.state_dict(), _heads(net)
    given = [key for key in state if key.startswith(heads)]
    needed = [key for key in wanted if key.startswith(heads)]
    sizes = {len(state[key]) for key in given if state[key].ndim}
    if num_classes is not None and num_classes not in sizes and given + needed:
        for key in given:
            del state[key]
        state.update({key: wanted[key] for key in needed})
        had = f"its head is dropped ({', '.join(given)})" if given else "it has no head"
        now = f", {', '.join(needed)} random" if needed else ""
        notes.append(f"{had}{now}, since num_classes={num_classes}.")
    stems = net.pretrained_cfg.get("first_conv") or ()
    for stem in (stems,) if isinstance(stems, str) else stems:
        old, new = state.get(f"{stem}.weight"), wanted.get(f"{stem}.weight")
        if old is not None and new is not None and old.ndim == 4 and old.shape[1] == 3 != new.shape[1]:
            from timm.models import adapt_input_conv

            state[f"{stem}.weight"] = adapt_input_conv(new.shape[1], old)
            notes.append(f"{stem}.weight is adapted from 3 to {new.shape[1]} channels.")
    return state


def faults(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return what stands against loading `state` strictly, by kind; nothing for a state dict that fits."""
    # PyTorch itself fills in a count of batches that a file from before version 0.4.1 does not have.
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    shapes = [
        f"{k} {list(state[k].shape)} for {list(wanted[k].shape)}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    # Infinity is a legal value (clipping bounds of gemma4_vit), but not for a variance.
    broken = [
        k
        for k, v in state.items()
        if v.isnan().any() or (k.endswith("running_var") and not bool(((v >= 0) & v.isfinite()).all()))
    ]
    found = {
        "missing": missing,
        "unexpected": [k for k in state if k not in wanted],
        "of another shape": shapes,
        "with NaN or an impossible running_var": broken,
    }
    return {kind: keys for kind, keys in found.items() if keys}
