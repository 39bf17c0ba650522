"""One file with all that the use of a trained network needs: safetensors with a JSON header, nothing is unpickled."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune_bn.backbones.card import Card, Task, Transform
from finetune_bn.backbones.create import create_backbone, data_config
from finetune_bn.backbones.predict import TrainedModel, checked_device
from finetune_bn.backbones.weights import faults
from finetune_bn.conversion.convert import convert
from finetune_bn.conversion.current import current_plan
from finetune_bn.conversion.policies import EvalNorm, ToGroupNorm
from finetune_bn.errors import BadData, ConversionMismatch, FinetuneBNError, MissingDependency, complaint
from finetune_bn.functional.frozen import TOLERANCE
from finetune_bn.layers.extra_state import EXTRA_STATE
from finetune_bn.utilities.files import write_atomically
from finetune_bn.utilities.probe import distance, quietly

KEY = "finetune_bn"  # in the file's metadata: the card
_PACKAGES = ("finetune-bn", "torch", "timm")
_CHANGE_EVALUATION = (ToGroupNorm, EvalNorm)  # all other layers compute in eval mode what BatchNorm does
_ROUNDING = 1e-6  # in float64: above what rounding leaves, below any other cause


def save(
    net: nn.Module,
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    task: Task = "classification",
    normalize: bool = False,
    transform: Transform | None = None,
    backbone: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a trained timm network to one file that `load` makes ready for use, and timm loads where it is its own.

    The weights are under timm's names. Layers that compute in eval mode what BatchNorm does (frozen ones, Ghost,
    Renorm, ...) are stored as BatchNorm, so that `timm.create_model(name, checkpoint_path=path)` takes the file;
    GroupNorm and EvalNorm are made again by `load`. The file is read back and compared with the network on an input
    before it is written: the network is not changed, and on any error neither is the file.

    Args:
        net: a timm model, converted or not.
        path: the file, overwritten if it is there; `.safetensors` is the usual suffix.
        classes: names of the classes, in the order of the logits. Default: their numbers.
        task: `classification`, or `embedding` for a network whose output is one.
        normalize: whether embeddings are scaled to length 1.
        transform: how images are prepared for evaluation. Default: as the pretrained weights want it.
        backbone: name of the timm model. Default: what `net` says.
        arguments: what else `timm.create_model` was given, as `global_pool`.
        about: plain data to keep in the file.

    Returns:
        The path.

    Raises:
        ConversionMismatch: read back, it would compute something else, as where `arguments` are missing.
        FinetuneBNError: an argument is wrong, weights are not finite, or the file cannot be written.
    """
    if not isinstance(getattr(net, "pretrained_cfg", None), dict):
        raise FinetuneBNError(complaint("net", type(net).__name__, "a timm model"))
    outputs, config = int(net.num_classes), data_config(net)  # type: ignore[arg-type]
    numbers = map(str, range(outputs if task == "classification" else 0))
    card = Card(
        task=task,
        backbone=backbone or str(net.pretrained_cfg["architecture"]),  # type: ignore[index]
        num_classes=outputs,
        in_chans=_in_chans(net),
        transform=transform or Transform.from_config(config),
        arguments=dict(arguments or {}),
        classes=tuple(numbers if classes is None else map(str, classes)),
        normalize=normalize,
        plan=current_plan(net),
        about=dict(about or {}),
        versions=_versions(),
    )
    content = _content(net, card)
    again, _ = _assembled(*_parsed(content, str(path)), str(path))
    off = _apart(again, net, card)
    if off is not None:
        remedy = f"What {card.backbone} was made with belongs into `arguments`, which are {dict(card.arguments)}."
        raise ConversionMismatch(
            f"path: read back from {path}, the network would differ by {off:.2g} of its largest output. Nothing was "
            f"written. {remedy}"
        )
    try:
        write_atomically(Path(path), content)
    except OSError as error:
        raise FinetuneBNError(complaint("path", str(path), "a file that can be written", f"{error}.")) from error
    return Path(path)


def load(path: str | os.PathLike[str], device: str | torch.device | None = None) -> TrainedModel:
    """Make a trained network ready for use: `finetune_bn.load("model.safetensors").predict("image.jpg")`.

    Needs timm and safetensors, not Lightning, and no network. Nothing in the file is executed.

    Args:
        path: a file that `save` or `FinetuneReport` wrote.
        device: where to compute, as `cuda`. Default: the CPU.

    Raises:
        MissingDependency: timm or safetensors is not installed.
        BadData: there is no such file; it is no model file, damaged, of a later version, or not whole.
        FinetuneBNError: there is no such device.
    """
    file = Path(path).expanduser() if isinstance(path, (str, os.PathLike)) else None
    if file is None or not file.is_file():
        allowed = "a model file as finetune_bn.save and FinetuneReport write it"
        raise BadData(complaint("path", path if file is None else str(path), allowed, "There is no such file."))
    model = TrainedModel(*_assembled(*_parsed(file.read_bytes(), str(path)), str(path)))
    return model if device is None else model.to(checked_device(device))


def _content(net: nn.Module, card: Card) -> bytes:
    """Return the bytes of the file."""
    safetensors = _import_safetensors()
    state = net.state_dict()
    wrong = _faults(_network(card), state)
    if wrong:
        allowed = f"{card.backbone} with {card.num_classes} outputs, and arguments {dict(card.arguments)}"
        raise FinetuneBNError(complaint("net", type(net).__name__, allowed, f"There are {_in_words(wrong)}."))
    # Copies: safetensors takes no two tensors of one memory.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    content: bytes = safetensors.save(tensors, {"format": "pt", KEY: card.to_json()})
    return content


def _parsed(content: bytes, origin: str) -> tuple[Card, dict[str, Tensor]]:
    """Return what a file holds: the card, and the tensors."""
    safetensors = _import_safetensors()
    allowed = "a model file as finetune_bn.save and FinetuneReport write it"
    try:
        tensors: dict[str, Tensor] = safetensors.load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
    except Exception as error:  # safetensors has errors of its own
        other = "It is a checkpoint of torch or Lightning: FinetuneReport writes a model file beside it."
        damaged = f"It is damaged or of another kind ({type(error).__name__}: {error})."
        raise BadData(complaint("path", origin, allowed, other if content[:2] == b"PK" else damaged)) from error
    if KEY not in metadata:
        remedy = f"It holds weights alone: finetune_bn.create_backbone(name, {origin!r}) loads them."
        raise BadData(complaint("path", origin, allowed, remedy))
    return Card.from_json(metadata[KEY], origin), tensors


def _assembled(card: Card, tensors: Mapping[str, Tensor], origin: str) -> tuple[nn.Module, Card]:
    """Return the network of a file, in eval mode, with its weights."""
    _check_sizes(card, tensors, origin)
    net = _network(card)
    wrong = _faults(net, tensors)
    allowed = f"the {len(net.state_dict())} tensors of {card.backbone} with {card.num_classes} outputs"
    if wrong:
        raise BadData(complaint("path", origin, allowed, f"There are {_in_words(wrong)}."))
    try:
        net.load_state_dict(tensors, strict=True)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise BadData(complaint("path", origin, allowed, why)) from error
    return net.eval(), card


def _check_sizes(card: Card, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Raise where a header asks for more channels or classes than any tensor has values: nothing is to be allocated."""
    largest = max((tensor.numel() for tensor in tensors.values()), default=0)
    for name in ("num_classes", "in_chans"):
        if getattr(card, name) > largest:
            why = f"Its header says {name}={getattr(card, name)}, and no tensor in it has as many values."
            allowed = "a model file as finetune_bn.save and FinetuneReport write it"
            raise BadData(complaint("path", origin, allowed, why))


def _faults(net: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return what stands against loading tensors strictly; the extra state of a layer may be of any length."""
    wanted = net.state_dict()
    lengths = {name: tensors[name] for name in wanted if name.endswith(EXTRA_STATE) and name in tensors}
    return faults({**wanted, **lengths}, tensors)


def _network(card: Card) -> nn.Module:
    """Return the network of a card with random weights; the random state is left alone."""
    if ":" in card.backbone:
        raise BadData(complaint("backbone", card.backbone, "a name of timm.list_models()"))
    sizes: dict[str, Any] = {"num_classes": card.num_classes, "in_chans": card.in_chans}
    with torch.random.fork_rng(devices=[]):
        net = create_backbone(card.backbone, None, **{**card.arguments, **sizes})
        rows = tuple(row for row in card.plan.rows if isinstance(row.policy, _CHANGE_EVALUATION))
        return convert(net, replace(card.plan, rows=rows), verify=False) if rows else net


def _apart(again: nn.Module, net: nn.Module, card: Card) -> float | None:
    """Return by how much two networks differ on an input in eval mode; None where it is rounding."""
    like = next(p for p in net.parameters() if p.is_floating_point())
    images = torch.randn(2, card.in_chans, *card.transform.size, generator=torch.Generator().manual_seed(0))

    def compare(one: nn.Module, other: nn.Module, x: Tensor) -> float:
        with quietly(one), quietly(other):
            return distance([one(x.to(_first(one))).float()], [other(x.to(_first(other))).float()])

    try:
        off = compare(again.to(like.device), net, images)
    except Exception as error:
        why = f"The network said: {type(error).__name__}: {error}"
        raise FinetuneBNError(
            complaint("transform.size", card.transform.size, f"a size that {card.backbone} takes", why)
        ) from error
    if off <= TOLERANCE.get(like.dtype, TOLERANCE[torch.float32]):
        return None
    with contextlib.suppress(Exception):  # a network that cannot be copied is left to its first verdict
        wide = [copy.deepcopy(part).double() for part in (again, net)]
        if compare(wide[0], wide[1], images) <= _ROUNDING:
            return None
    return off


def _first(net: nn.Module) -> Tensor:
    return next(p for p in net.parameters() if p.is_floating_point())


def _in_chans(net: nn.Module) -> int:
    """Return how many channels the first convolution takes; where timm names none, what the data config says."""
    config: dict[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
    first = config.get("first_conv")
    weight = dict(net.named_parameters()).get(f"{first if isinstance(first, str) else (first or ('',))[0]}.weight")
    return int(weight.shape[1] if weight is not None and weight.ndim == 4 else config["input_size"][0])


def _in_words(wrong: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in wrong.items())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        allowed, remedy = "safetensors 0.4.5 and newer", "Run: pip install safetensors"
        raise MissingDependency(complaint("safetensors", "not installed", allowed, remedy)) from error
    return safetensors.torch
