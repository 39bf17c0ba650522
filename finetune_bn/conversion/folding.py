"""Tie the producers and frozen layers that a plan pairs, and prove that outputs and gradients stay what they are."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from finetune_bn.conversion.plan import Plan
from finetune_bn.functional.frozen import TOLERANCE
from finetune_bn.layers.fold_tie import Fold
from finetune_bn.layers.folds import always_folded, fold_pair, folds_in, is_producer, unfolded, why_not_folded
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.utilities.probe import Probe, can_run, find_probes, quietly, tensors_in

log = logging.getLogger("finetune_bn")

# Gradients run through the whole network and back: in float32 a wrong one differs by far more, and what differs by
# more than this is looked at in float64, where only rounding is below the second number.
_OF_GRADIENTS = 1e-3
_ROUNDING = 1e-6


@contextlib.contextmanager
def untied(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Untie the frozen layers among `layers` from their producers; tie them again if the block raises."""
    folds = [layer._fold for layer in layers if isinstance(layer, FrozenBatchNorm) and layer._fold is not None]
    for fold in folds:
        fold.undo()
    try:
        yield
    except BaseException:
        for fold in folds:
            fold.redo()
        raise


def fold_plan(model: nn.Module, plan: Plan, example_input: Any, verify: bool) -> None:
    """Fold what the plan pairs; undo, with a warning, what changes outputs or gradients on a probe input."""
    names, folds = {}, []
    for row in plan.rows:
        if not row.folded_into:
            continue
        norm = model.get_submodule(row.names[0])
        problem = _why_not(model, row.folded_into, norm)
        if problem:
            log.warning("%s is not folded into %s: that %s", row.names[0], row.folded_into, problem)
            continue
        assert isinstance(norm, FrozenBatchNorm)
        always = getattr(row.policy, "fold", "") == "always"
        folds.append(fold_pair(model.get_submodule(row.folded_into), norm, model, always))
        names[id(folds[-1])] = f"{row.names[0]} into {row.folded_into}"
    if not folds or not verify or not can_run(model):
        return
    with always_folded(model):  # a probe input may be smaller than what the model is trained on
        wrong = _wrong_folds(model, folds, example_input)
    for fold in wrong:
        fold.undo()
    if wrong:
        log.warning(
            "not folded, as outputs or gradients would change: %s", ", ".join(names[id(fold)] for fold in wrong)
        )


def as_carried_out(plan: Plan, model: nn.Module) -> Plan:
    """Return the plan with the folds that were undone taken out, after it was carried out on `model`."""
    rows = []
    for row in plan.rows:
        if row.folded_into and getattr(model.get_submodule(row.names[0]), "_fold", None) is None:
            why = f"outputs or gradients would change with {row.folded_into}"
            row = dataclasses.replace(row, folded_into="", not_folded=why)
        rows.append(row)
    return dataclasses.replace(plan, rows=tuple(rows))


def _why_not(model: nn.Module, name: str, norm: nn.Module) -> str | None:
    try:
        producer = model.get_submodule(name)
    except AttributeError:
        return "is not there"
    if not is_producer(producer):
        return f"is a {type(producer).__name__}"
    channels = getattr(producer, "out_channels", getattr(producer, "out_features", None))
    if channels != norm.num_features:
        return f"has {channels} channels, not {norm.num_features}"
    return why_not_folded(producer)


def _wrong_folds(model: nn.Module, folds: Sequence[Fold], example_input: Any) -> list[Fold]:
    """Return the folds with which the network computes something else than without."""
    probes = find_probes(model, example_input)
    try:
        plain = _measure_all(model, probes)
    except Exception as error:
        log.warning("no proof that folding keeps the gradients: without it, too, they cannot be computed (%s)", error)
        return []
    try:
        if _same(model, probes, plain, TOLERANCE.get(_dtype(model), _OF_GRADIENTS), _OF_GRADIENTS):
            return []
    except Exception as error:
        log.info("with folded layers the network raises %r", error)
    try:  # in float64 a network that amplifies rounding cannot be mistaken for a wrong fold
        wide = copy.deepcopy(model).double()
        example_input = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, example_input)
        probes = find_probes(wide, example_input)
        plain = _measure_all(wide, probes)
        copies = folds_in(wide)
        order = {id(fold): i for i, fold in enumerate(folds_in(model))}
        ours = [copies[order[id(fold)]] for fold in folds]
        if _same(wide, probes, plain, _ROUNDING, _ROUNDING):
            return []
        good = []
        for fold in copies:
            fold.active = False
        for fold in ours:
            fold.active = True
            with contextlib.suppress(Exception):
                if _same(wide, probes, plain, _ROUNDING, _ROUNDING):
                    good.append(fold)
            fold.active = False
        for fold in good:
            fold.active = True
        if not _same(wide, probes, plain, _ROUNDING, _ROUNDING):
            good = []
        return [fold for fold, twin in zip(folds, ours, strict=True) if twin not in good]
    except Exception as error:  # it cannot be copied, or does not compute in float64
        log.info("folds could not be told apart in float64: %s", error)
        return list(folds)


_Measured = tuple[list[Tensor], list[Tensor]]


def _measure_all(model: nn.Module, probes: Sequence[Probe]) -> list[_Measured]:
    """Return outputs and gradients in activation space, for each probe."""
    with unfolded(model):
        return [_measure(model, probe) for probe in probes]


def _same(
    model: nn.Module, probes: Sequence[Probe], plain: Sequence[_Measured], allowed: float, of_gradients: float
) -> bool:
    """Tell whether outputs and gradients are those in activation space."""
    for probe, (plain_outputs, plain_gradients) in zip(probes, plain, strict=True):
        outputs, gradients = _measure(model, probe)
        if _distance(outputs, plain_outputs) > allowed or _distance(gradients, plain_gradients) > of_gradients:
            return False
    return True


def _measure(model: nn.Module, probe: Probe) -> _Measured:
    """Return outputs, and the gradients of a fixed random sum of them for parameters and input."""
    inputs: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        inputs.append(tensor.detach().clone().requires_grad_())
        return inputs[-1] * 1  # no leaf, so that a model may write to it

    with quietly(model), torch.enable_grad():
        args, kwargs = tree_map_only(Tensor, leaf, (probe.args, probe.kwargs))
        returned = tensors_in(model.get_submodule(probe.name)(*args, **kwargs), detach=False)
        outputs = [t for t in returned if t.requires_grad]
        if not outputs:
            return [t.detach() for t in returned], []
        wanted = [p for p in model.parameters() if p.requires_grad] + inputs
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
        gradients = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
    return [t.detach() for t in outputs], [g for g in gradients if g is not None]


def _distance(tensors: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Return the largest difference relative to the tensor's largest value, and to 1e-6 of the largest of all.

    Some gradients are zero but for rounding, as that of a bias before a softmax.
    """
    if [t.shape for t in tensors] != [t.shape for t in reference]:
        return float("inf")
    sizes = [float(t.abs().max()) if t.numel() else 0.0 for t in reference]
    floor = 1e-6 * max(sizes, default=0.0)
    off = 0.0
    for a, b, size in zip(tensors, reference, sizes, strict=True):
        if a.numel() and not torch.equal(a, b):
            difference = float((a - b).abs().max()) / max(size, floor, torch.finfo(torch.float32).tiny)
            off = max(off, difference if difference == difference else float("inf"))
    return off


def _dtype(model: nn.Module) -> torch.dtype:
    dtypes = {p.dtype for p in model.parameters()} & TOLERANCE.keys()
    return max(dtypes, key=lambda dtype: TOLERANCE[dtype], default=torch.float32)
