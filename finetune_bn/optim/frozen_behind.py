"""Which convolutions have a frozen BatchNorm layer behind them, which is what their steps have to be bounded for."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.utilities.probe import can_run, find_probes, quietly, storage_of

log = logging.getLogger("finetune_bn")

_ADD = {torch.ops.aten.add, torch.ops.aten.add_}


@dataclass(frozen=True)
class FrozenBehind:
    """The convolutions of a network whose output reaches a frozen layer before another convolution or linear map.

    Attributes:
        names: theirs, as `named_modules` has them.
        how: how that was found out, in words.
    """

    names: frozenset[str]
    how: str


def frozen_behind(net: nn.Module, example_input: Any = None) -> FrozenBehind:
    """Find the convolutions of `net` with a frozen BatchNorm layer behind them; the network is not changed.

    Found by running `example_input`, or one that the network itself tells (timm models, Lightning modules with an
    `example_input_array`). Between the two may be activations, pooling, concatenations and sums. An adapter, a trained
    convolution whose result is added to that of one that is not trained, does not count: the frozen layer's statistics
    are those of the other. Nor does a layer whose statistics are still a new layer's, 0 and 1, among others that are
    not: it stands in a part that was not pretrained. For layers that no probe reaches, the order decides
    in which the modules are defined.

    Args:
        net: any module.
        example_input: a tensor, tuple or dict that `net.forward` takes.

    Raises:
        FinetuneBNError: `net` refuses the `example_input`.
    """
    layers = {id(m): name for name, m in net.named_modules() if _is_frozen(m)}
    modules = dict(net.named_modules())
    fresh = {key for key, name in layers.items() if _is_fresh(modules[name])}
    if len(fresh) < len(layers):  # a network that is frozen as it was initialized has no pretrained part
        layers = {key: name for key, name in layers.items() if key not in fresh}
    if not layers:
        return FrozenBehind(frozenset(), "there is no frozen layer")
    found, reached = _by_probes(net, set(layers), example_input)
    rest = {name for key, name in layers.items() if key not in reached}
    found |= _by_definition(net, rest)
    how = "by running a probe input" if reached else "by the order in which the modules are defined: no probe input"
    if reached and rest:
        how += f", but for {len(rest)} frozen layers that it did not reach, by the order in which modules are defined"
    return FrozenBehind(frozenset(found), how)


def _by_probes(net: nn.Module, layers: set[int], example_input: Any) -> tuple[set[str], set[int]]:
    """Return the convolutions that were found behind frozen layers, and which of the layers were reached."""
    probes = find_probes(net, example_input) if can_run(net) else []
    trace = _Trace()
    handles: list[Any] = []
    for name, module in net.named_modules():
        if isinstance(module, _ConvNd):
            trace.trained |= {name} if any(p.requires_grad for p in module.parameters()) else set()
            handles.append(module.register_forward_hook(trace.made_by(name)))
        elif id(module) in layers:
            handles.append(module.register_forward_pre_hook(trace.arrive))
        if _ends_here(module):
            handles.append(module.register_forward_hook(trace.end))
    try:
        for probe in probes:
            try:
                with quietly(net), trace:
                    probe.call(net)
            except Exception as error:
                if probe.given and example_input is not None:
                    probe.run(net)  # raises with the input named
                log.info("no probe input for the step limit: %s: %s", type(error).__name__, error)
                return set(), set()
    finally:
        for handle in handles:
            handle.remove()
    return trace.found, trace.reached


class _Trace(TorchDispatchMode):
    """Follows the results of convolutions through what happens between modules, by the memory that holds them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trained: set[str] = set()
        self.found: set[str] = set()
        self.reached: set[int] = set()
        self._sources: dict[int, frozenset[str]] = {}  # a place's tensor passes here when it is made: none is stale
        self._direct: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [storage_of(leaf) for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        sources = frozenset[str]().union(*(self._sources.get(place, ()) for place in read))
        if func.overloadpacket in _ADD:
            summands = {self._direct[place] for place in read if place in self._direct}
            if summands - self.trained:
                sources -= summands & self.trained
        for leaf in tree_leaves(out):
            if torch.is_tensor(leaf):
                self._direct.pop(storage_of(leaf), None)
                self._sources[storage_of(leaf)] = sources
        return out

    def made_by(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if torch.is_tensor(output):
                self._sources[storage_of(output)] = frozenset({name})
                self._direct[storage_of(output)] = name

        return hook

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        for leaf in tree_leaves(output):
            if torch.is_tensor(leaf):
                self._sources.pop(storage_of(leaf), None)

    def arrive(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.reached.add(id(module))
        if args and torch.is_tensor(args[0]):
            self.found |= self._sources.get(storage_of(args[0]), frozenset())


def _by_definition(net: nn.Module, layers: set[str]) -> set[str]:
    """Return the convolutions that stand before one of the layers, as far as the order of definition tells.

    Those with as many channels as the next such layer and nothing with weights between, and those that some such layer
    comes after and that are held by the same module as one (densenet and its kin normalize before they convolve).
    """
    found: set[str] = set()
    waiting: list[str] = []
    conv, channels = "", 0
    holders = {name.rpartition(".")[0] for name in layers}
    for name, module in net.named_modules():
        if isinstance(module, _ConvNd):
            conv, channels = name, module.out_channels
            waiting += [name] if name.rpartition(".")[0] in holders else []
        elif name in layers:
            found |= {conv} if conv and module.running_mean.numel() == channels else set()
            found.update(waiting)
            conv, waiting = "", []
        elif next(module.parameters(recurse=False), None) is not None:
            conv = ""
    return found


def _is_frozen(module: nn.Module) -> bool:
    """Ours, or one of torchvision's, timm's or detectron2's."""
    own = isinstance(module, FrozenBatchNorm)
    return own or ("FrozenBatchNorm" in type(module).__name__ and hasattr(module, "running_mean"))


def _ends_here(module: nn.Module) -> bool:
    """Tell whether what a module returns is scaled by itself: a linear map or a norm layer of any kind."""
    norms = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return isinstance(module, (nn.Linear, *norms)) or _is_frozen(module)


def _is_fresh(layer: nn.Module) -> bool:
    """Tell whether the statistics are those of a layer that has seen no image."""
    source = getattr(layer, "source", None)
    of = source if source is not None and getattr(layer, "affine_kind", "") == "merged" else layer
    mean, var = getattr(of, "running_mean", None), getattr(of, "running_var", None)
    if mean is None or var is None or mean.is_meta:
        return False
    return not bool(mean.any()) and bool((var == 1).all())
