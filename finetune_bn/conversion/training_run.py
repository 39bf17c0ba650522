"""Run a network once in training mode and leave no trace, to see which layers run, and what runs beside its module.

A layer's tensors can be used by `torch.nn.functional.batch_norm` past the layer: in a graph that torch.fx has traced
through it, or by hand. What replaces the layer has no say there, and the statistics go on moving.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.utilities.probe import Probe, quietly

_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class TrainingRun:
    """What happened to some layers when the network ran in training mode.

    Attributes:
        ran: indices of the layers that were called.
        moved: indices of the layers whose running statistics moved.
        problem: what the network raised, if it did: some take no batch without targets in training mode.
    """

    ran: frozenset[int] = frozenset()
    moved: frozenset[int] = frozenset()
    problem: str = ""


def run_in_training(model: nn.Module, probes: Sequence[Probe], layers: Sequence[nn.Module]) -> TrainingRun:
    """Run the probes in training mode without gradients; parameters, buffers, modes and random state are restored.

    BatchNorm layers other than `layers` evaluate: they have nothing to tell, and may refuse a batch of one image.

    Args:
        model: the network.
        probes: inputs for it.
        layers: the layers to watch.
    """
    ran: set[int] = set()
    moved: set[int] = set()
    problem = ""
    watched = {id(layer): i for i, layer in enumerate(layers)}
    before = [[_copied(layer, name) for name in _STATISTICS] for layer in layers]

    def see(module: nn.Module, args: Any) -> None:
        if id(module) in watched:  # an old layer and its new one share their hooks
            ran.add(watched[id(module)])

    handles = [layer.register_forward_pre_hook(see) for layer in layers]
    try:
        with warnings.catch_warnings(), tensors_restored(model), quietly(model):
            warnings.simplefilter("ignore")
            for module in model.modules():
                live = isinstance(module, _BatchNorm) and id(module) not in watched
                module.training = not live and not isinstance(module, torch.jit.ScriptModule)
            try:
                for probe in probes:
                    probe.call(model)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            for i, layer in enumerate(layers):
                now = [layer._buffers.get(name) for name in _STATISTICS]
                if any(
                    a is not None and b is not None and not torch.equal(a, b)
                    for a, b in zip(before[i], now, strict=True)
                ):
                    moved.add(i)
    finally:
        for handle in handles:
            handle.remove()
    return TrainingRun(frozenset(ran), frozenset(moved), problem)


@contextlib.contextmanager
def tensors_restored(model: nn.Module) -> Iterator[None]:
    """Give parameters, buffers, tensors and lists that modules hold their values of before, after the block."""
    held = [value for module in model.modules() for value in vars(module).values()]
    lists = [(value, list(value)) for value in held if isinstance(value, list)]
    try:
        with _restored([*model.parameters(), *model.buffers(), *(v for v in held if torch.is_tensor(v))]):
            yield
    finally:
        for value, content in lists:
            value[:] = content


@contextlib.contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Give the buffers of the model their values of before, after the block: a traced graph may train in eval mode."""
    with _restored(list(model.buffers())):
        yield


@contextlib.contextmanager
def _restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    copies = [(t, t.data, t.detach().clone()) for t in {id(t): t for t in tensors}.values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, data, copy in copies:
                if tensor.data_ptr() != data.data_ptr():  # `p.data = ...`, as momentum encoders do
                    tensor.data = data
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)


def _copied(layer: nn.Module, name: str) -> Tensor | None:
    tensor = layer._buffers.get(name)
    return None if tensor is None else tensor.detach().clone()
