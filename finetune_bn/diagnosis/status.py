"""What the normalization layers of a model are at this moment, what is trained, and what nobody can have wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from finetune_bn.conversion.current import policy_of
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.frozen import LEARNABLE, FrozenBatchNorm
from finetune_bn.layers.group_norm import GroupNorm
from finetune_bn.layers.hold_affine import is_held
from finetune_bn.layers.sites import find_batch_norms, find_lookalikes
from finetune_bn.utilities.layer_figure import layer_figure
from finetune_bn.utilities.results import Result, Shown

State = Literal["live", "frozen", "held", "GroupNorm", "foreign"]
NAMES_SHOWN = 3


@dataclass(frozen=True)
class LayerStatus:
    """One normalization layer.

    Attributes:
        names: all names under which the model holds it; "" is the root.
        kind: its class; with the module that it is from where it is foreign.
        state: `live` (normalizes by the batch in training), `frozen` (never does), `held` (live, with gamma and beta
            constant), `GroupNorm` (converted to it), or `foreign` (keeps running statistics, and is no BatchNorm of
            torch's or of this package's: FrozenBatchNorm2d of torchvision, timm or detectron2, for example).
        what: the policy it is under, in words; `untouched` for a BatchNorm as it came.
        trained: how many numbers of it are trained.
        irregular: what is wrong with it, a sentence each.
    """

    names: tuple[str, ...]
    kind: str
    state: State
    what: str
    trained: int
    irregular: tuple[str, ...] = ()


@dataclass(frozen=True)
class Status(Result):
    """The normalization layers of a model, and its numbers; `print` it.

    Attributes:
        model: class name of the model.
        layers: in the order of definition.
        trained_norm: how many numbers of normalization layers are trained.
        trained_other: how many others are.
        constant: how many numbers are not trained, gamma and beta of frozen layers included.
    """

    model: str
    layers: tuple[LayerStatus, ...]
    trained_norm: int
    trained_other: int
    constant: int

    def count(self, state: State) -> int:
        """Return how many layers are in a state."""
        return sum(layer.state == state for layer in self.layers)

    @property
    def irregular(self) -> dict[str, list[str]]:
        """What is wrong, and the names of the layers with which it is."""
        found: dict[str, list[str]] = {}
        for layer in self.layers:
            for problem in layer.irregular:
                found.setdefault(problem, []).append(" = ".join(name or "(root)" for name in layer.names))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers], "irregular": self.irregular}

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return header and cells of the table: layers of one kind in one state are one row."""
        groups: dict[tuple[str, str, str], list[LayerStatus]] = {}
        for layer in self.layers:
            groups.setdefault((layer.state, layer.what, layer.kind), []).append(layer)
        cells = [
            [str(len(group)), state, what, kind, f"{sum(layer.trained for layer in group):,}", _some(group)]
            for (state, what, kind), group in groups.items()
        ]
        return ["layers", "state", "under", "type", "trained", "names"], cells

    def shown(self) -> Shown:
        """Return the states in total, and a row for layers of one kind in one state."""
        states = {layer.state: self.count(layer.state) for layer in self.layers}
        total = ", ".join(f"{n} {state}" for state, n in states.items()) or "no BatchNorm layer"
        wrong = sum(len(names) for names in self.irregular.values())
        header, rows = self.rows()
        numbers = (
            f"trained: {self.trained_norm:,} numbers of normalization layers, {self.trained_other:,} others; "
            f"constant: {self.constant:,}"
        )
        irregular = [f"irregular: {_listed(names)}: {problem}" for problem, names in self.irregular.items()]
        title = f"{self.model}: {total}; {wrong or 'nothing'} irregular"
        return Shown(title, header if rows else (), rows, [numbers, *irregular])

    def plot(self) -> Any:
        """Return a matplotlib figure: how many numbers of each layer are trained, in the color of its state."""
        states = list(dict.fromkeys(layer.state for layer in self.layers))
        values: dict[str, list[int | None]] = {
            state: [layer.trained if layer.state == state else None for layer in self.layers] for state in states
        }
        names = [layer.names[0] for layer in self.layers]
        return layer_figure(
            f"{self.model}: what is trained of each layer", names, {"numbers trained": values}, stacked=True
        )


def status(model: nn.Module) -> Status:
    """Tell what each normalization layer of a model is now, how much is trained, and what is irregular.

    Nothing is run and nothing is changed. Irregular is what training would go on with in silence: a live layer in
    eval mode while the model is in training mode; a layer without trained numbers whose statistics move all the same;
    a constant that requires a gradient, and the reverse; statistics that are not finite, that never move, or that have
    seen no image; a layer that normalizes by the batch in evaluation too; one layer under several names.

    Args:
        model: any module, also one that is compiled or wrapped for several processes.

    Raises:
        FinetuneBNError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise FinetuneBNError(complaint("model", model, "a torch.nn.Module"))
    layers: dict[str, LayerStatus] = {}
    for site in find_batch_norms(model, group_norms=True):
        policy = policy_of(site.module)
        what = "untouched" if policy is None else policy.describe()
        problems = tuple(_irregular(model, site.names, site.module))
        state, trained = _state(site.module), _trained(site.module)
        layers[site.names[0]] = LayerStatus(site.names, site.kind, state, what, trained, problems)
    for name, module in find_lookalikes(model):
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        problems = tuple(_irregular_values(module))
        layers.setdefault(name, LayerStatus((name,), kind, "foreign", "left alone", _trained(module), problems))
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    norms = {id(p) for module in model.modules() if _is_norm(module) for p in module.parameters(recurse=False)}
    learned = [p for p in model.parameters() if p.requires_grad]
    of_norm = _numbers(p for p in learned if id(p) in norms)
    constants: list[Tensor] = [p for p in model.parameters() if not p.requires_grad]
    constants += [b for module in model.modules() if _is_norm(module) for b in _affine(module, module._buffers)]
    return Status(
        type(model).__name__,
        tuple(layers[name] for name in sorted(layers, key=order.__getitem__)),
        of_norm,
        _numbers(learned) - of_norm,
        _numbers(constants),
    )


def _state(layer: nn.Module) -> State:
    if isinstance(layer, FrozenBatchNorm):
        return "frozen"
    if isinstance(layer, GroupNorm):
        return "GroupNorm"
    return "held" if is_held(layer) else "live"


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ or isinstance(module, (_BatchNorm, FrozenBatchNorm))


def _affine(module: nn.Module, among: Any) -> list[Tensor]:
    return [among[name] for name in ("weight", "bias") if among.get(name) is not None]


def _trained(module: nn.Module) -> int:
    return _numbers(p for p in module.parameters(recurse=False) if p.requires_grad)


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(0 if is_lazy(tensor) else tensor.numel() for tensor in tensors)  # a lazy layer has none yet


def _irregular(model: nn.Module, names: tuple[str, ...], layer: nn.Module) -> Iterator[str]:
    """Yield what is wrong with a layer that we know."""
    parameters, constants = _affine(layer, layer._parameters), _affine(layer, layer._buffers)
    if isinstance(layer, FrozenBatchNorm):
        idle = [p for p in LEARNABLE[layer.affine_kind] if not getattr(layer, p, torch.empty(0)).requires_grad]
        if idle:
            yield f"affine={layer.affine_kind} is to train {' and '.join(idle)}, and requires_grad is False there"
        if _saw_nothing(layer):
            yield "frozen at the statistics of a layer that has seen no image (mean 0, variance 1)"
    elif is_held(layer):
        constants += parameters
    elif isinstance(layer, _BatchNorm) and layer.training and parameters and not _trained(layer):
        yield "its weight and bias do not require a gradient, yet its statistics move in training: freeze it by convert"
    if any(constant.requires_grad for constant in constants):
        yield "a constant requires a gradient: an optimizer that holds it would move it"
    if isinstance(layer, _BatchNorm):
        if model.training and not layer.training:
            yield "in eval mode while the model is in training mode: it normalizes by running statistics that stay"
        if layer.running_mean is None:
            yield "without running statistics: it normalizes by the batch in evaluation too"
        elif layer.momentum is None:
            yield "momentum None: its statistics are the average of all batches ever, the early ones included"
        elif layer.momentum == 0:
            yield "momentum 0: its statistics never move"
    if len(names) > 1:
        yield "one layer under several names: it normalizes different inputs by one set of statistics"
    yield from _irregular_values(layer)


def _irregular_values(layer: nn.Module) -> Iterator[str]:
    for name in ("running_mean", "running_var", "weight", "bias"):
        values = layer._buffers.get(name) if name in layer._buffers else layer._parameters.get(name)
        if values is None or values.is_meta or is_lazy(values):
            continue
        if not bool(torch.isfinite(values.detach()).all()):
            yield f"{name} is not finite"
        elif name == "running_var" and bool((values < 0).any()):
            yield "running_var is negative"


def _saw_nothing(layer: FrozenBatchNorm) -> bool:
    tensors = [t for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias) if t is not None]
    if any(t.is_meta for t in tensors) or layer.affine_kind == "merged":  # of that one the statistics say nothing
        return False
    return bool((layer.running_mean == 0).all() and (layer.running_var == 1).all())


def _listed(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _some(layers: list[LayerStatus]) -> str:
    return _listed([" = ".join(name or "(root)" for name in layer.names) for layer in layers])
