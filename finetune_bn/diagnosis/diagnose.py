"""`diagnose`: what a model, its data and its batches are like, before anything is trained."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence, Sized
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from finetune_bn.conversion.convert import convert
from finetune_bn.conversion.policies import Keep, Policy
from finetune_bn.diagnosis.eval_pass import Seen, SeenLayer, eval_pass, pass_chunk
from finetune_bn.diagnosis.findings import Facts, findings_of
from finetune_bn.diagnosis.leakage import Leakage, as_in_training, measure_leakage, output_gap
from finetune_bn.diagnosis.normalization import Normalization, look_at_inputs
from finetune_bn.diagnosis.policy_costs import POLICIES, policy_costs, unheard
from finetune_bn.diagnosis.results import (
    BatchDiagnosis,
    Curvature,
    Diagnosis,
    Finding,
    LayerDiagnosis,
    PolicyMemory,
)
from finetune_bn.diagnosis.rows import batches_of, figures_of, p_values_of, rows_of
from finetune_bn.diagnosis.steps import LossFunction, Steps, measure_curvature
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.ghost import GhostBatchNorm
from finetune_bn.layers.renorm import BatchRenorm
from finetune_bn.layers.sites import BatchNormSite, find_batch_norms, find_lookalikes, why_left_alone
from finetune_bn.layers.statistics import why_no_statistics
from finetune_bn.utilities.batches import Chunk, Feeder, Forward, check_batches, known_length
from finetune_bn.utilities.checks import number
from finetune_bn.utilities.probe import undisturbed, unwrapped
from finetune_bn.utilities.progress import progress_bar

__all__ = [
    "BatchDiagnosis",
    "Curvature",
    "Diagnosis",
    "Finding",
    "LayerDiagnosis",
    "PolicyMemory",
    "diagnose",
]

# Images that a policy's step is counted on.
_COUNTED = 4


def diagnose(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    policy: Policy | None = None,
    loss: LossFunction | None = None,
    forward: Forward | None = None,
    labels: int | str | None = None,
    optimizer: torch.optim.Optimizer | str | None = None,
    lr: float | None = None,
    devices: int = 1,
    sync: bool = False,
    accumulate: int = 1,
    steps: int | None = None,
    ema: tuple[float, int] | None = None,
    max_images: int = 1000,
    seconds: float = 60.0,
    curvature: bool = True,
    memory: bool = True,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    notes: Sequence[Finding] = (),
) -> Diagnosis:
    """Look at a model and the batches that it is to be trained on, and say what matters for its BatchNorm layers.

    Nothing is trained: modes, weights, buffers, gradients, hooks and random states are afterwards as before. Measured
    are, in eval mode, how far the data are from the stored statistics, whether batches are independent draws
    (permutation tests of images' channel means, and of labels), what a batch is worth (DEFF, n_eff) and where running
    variances would settle; and, with live layers, how far the outputs of the two modes are apart, how far images leak
    into each other, how curved the loss is (Hessian-vector products) beside frozen layers, and what a step keeps and
    launches under each policy.

    Args:
        model: any module, before it is converted, compiled or wrapped.
        loader: the training batches, as they come: a DataLoader or a list. It is read from its beginning, no further
            than needed; a sampler that counts epochs counts this one.
        policy: under which policy training is planned; decides what is a matter of warning. None: as the model is.
        loss: `(model, batch)` that returns the loss of a batch as it came, moved to the device; for the curvature.
            None: cross-entropy of the outputs [N, classes] with the labels.
        forward: `(model, batch)` that passes a batch to the model; None: its first tensor, or the keys it takes.
        labels: where labels are in a batch, a position or a key; None: second in a tuple, or under a usual key.
        optimizer: the optimizer, or its name such as `adamw`; decides which bound the learning rate has.
        lr: the learning rate; None: that of the optimizer.
        devices: how many devices train together.
        sync: whether BatchNorm will be synchronized over them; so it is where layers are SyncBatchNorm already.
        accumulate: batches whose gradients make one step.
        steps: optimizer steps of the training, for what is said of averaged weights.
        ema: decay of averaged weights, and the step from which they are averaged.
        max_images: so many images are looked at.
        seconds: about so long it may take; what there is no time for is left out, and named.
        curvature: whether the curvature is measured.
        memory: whether memory and launches are counted.
        device: where it runs; None: where the model is.
        progress: whether a bar is shown; None: on a terminal.
        notes: findings of the caller, to stand among the others.

    Raises:
        BadData: there are no batches, or no finite image.
        FinetuneBNError: an argument is wrong, or the model does not take the images.
    """
    began = time.perf_counter()
    model = unwrapped(model)
    batches = check_batches(loader, "loader")
    if policy is not None and not isinstance(policy, Policy):
        raise FinetuneBNError(complaint("policy", policy, "a policy such as Freeze('none'), or None"))
    for name, value in (("devices", devices), ("accumulate", accumulate), ("max_images", max_images)):
        number(name, value, least=1, whole=True)
    number("steps", steps, least=1, whole=True, none=True)
    number("seconds", seconds, above=0)
    planned = Steps.of(optimizer, lr)
    feeder = Feeder(model, forward, _checked_device(device, model))
    sites = find_batch_norms(model)
    live = _live(model, sites, policy)

    def until(share: float) -> float:
        return began + share * seconds

    left_out: list[str] = []
    found: Curvature | None = None
    costs: list[PolicyMemory] = []
    with progress_bar("Diagnosis", "steps", None, progress) as report, undisturbed(model, feeder.functions) as state:
        with torch.no_grad():
            seen = eval_pass(
                feeder, sites, batches, labels=labels, max_images=max_images, until=until(0.45), report=report
            )
            state.restore()
            inputs = _inputs(model, feeder, sites, seen.chunks[0])
            p_values = p_values_of(seen)
            report(seen.images, "images; now in training mode")
            gap, leakage, why = _as_in_training(model, feeder, sites, seen)
            state.restore()
            left_out += why
        if curvature and sites:
            report(seen.images, "images; now the curvature")
            of_first = _labels_of_first(seen)
            found, reason = measure_curvature(
                model, feeder, seen.batches, seen.chunks, of_first, loss, planned, state, until(0.8)
            )
            left_out += [reason] if reason else []
        if found is None and planned.lr is not None:
            found = Curvature(optimizer=planned.name, lr=planned.lr)
        if memory and sites and feeder.forward is None and not seen.chunks[0].whole:
            wanted = [*POLICIES, *([policy] if policy is not None and policy not in POLICIES else [])]
            costs, reasons = policy_costs(
                model, seen.chunks[0][:_COUNTED], wanted, until=until(1.0), report=lambda n, note: report(n, note)
            )
            left_out += reasons
        elif memory and sites:
            left_out.append("memory: batches that only a forward= can pass cannot be cut")
    synced = sync or any(isinstance(site.module, nn.SyncBatchNorm) for site in sites)
    size = round(median(seen.sizes))
    rows = rows_of(sites, seen, live, leakage, size * (devices if synced else 1))
    diagnosed = batches_of(seen, rows, size, p_values, gap, leakage)
    diagnosed = replace(diagnosed, devices=devices, synced=synced, accumulate=accumulate)
    facts = Facts(
        layers=rows,
        batches=diagnosed,
        images=seen.images,
        bad=seen.bad,
        one_label=len(set(seen.labels)) == 1 and seen.images > 1,
        live=live,
        policy=None if policy is None else policy.describe(),
        inputs=inputs,
        curvature=found,
        steps=steps,
        ema=ema,
        unknown=[(name, why_left_alone(module)) for name, module in find_lookalikes(model)] if not sites else (),
        notes=notes,
    )
    return Diagnosis(
        model=type(model).__name__,
        family=_family(model),
        images=seen.images,
        classes=len(set(seen.labels)) or None,
        train_images=_train_images(loader, seen),
        policy=facts.policy,
        findings=findings_of(facts),
        layers=rows,
        batches=diagnosed,
        curvature=found,
        memory=tuple(costs),
        left_out=tuple(left_out),
        seconds=time.perf_counter() - began,
    )


def _checked_device(device: torch.device | str | None, model: nn.Module) -> torch.device | None:
    """Return the device, if the model is there.

    Raises:
        FinetuneBNError: there is no such device here, or the model is on another one.
    """
    if device is None:
        return None
    try:
        wanted = torch.empty(0, device=device).device
    except Exception as error:  # an assertion, a runtime error, as the kind of device has it
        here = "cuda" if torch.cuda.is_available() else "cpu"
        said = f"torch said: {(str(error).splitlines() or [''])[0]}"
        raise FinetuneBNError(
            complaint("device", str(device), f"a device of this machine, such as {here}", said)
        ) from None
    like = next((t for t in (*model.parameters(), *model.buffers())), None)
    if like is not None and like.device.type != wanted.type:
        raise FinetuneBNError(complaint("device", str(device), f"{like.device}, where the model is", "Move it first."))
    return wanted


def _live(model: nn.Module, sites: Sequence[BatchNormSite], policy: Policy | None) -> frozenset[str]:
    """Return the names of the layers that normalize by the batch in the training that is planned."""
    after = sites
    if policy is not None and not isinstance(policy, Keep) and sites:
        with unheard():
            after = find_batch_norms(convert(copy.deepcopy(model), policy, verify=False))
    by_batch = [
        site
        for site in after
        if isinstance(site.module, nn.modules.batchnorm._BatchNorm)
        and not isinstance(site.module, (GhostBatchNorm, BatchRenorm))
    ]
    return frozenset(site.names[0] for site in by_batch)


def _inputs(model: nn.Module, feeder: Feeder, sites: Sequence[BatchNormSite], chunk: Chunk) -> Normalization | None:
    """Return how images were normalized; None where the model takes something else than one tensor of them."""
    if feeder.forward is not None or chunk.content[1] or len(chunk.content[0]) != 1:
        return None
    first = next((site for site in sites if why_no_statistics(site.module, preserve=False) is None), None)

    def shift(images: Tensor) -> float | None:
        if first is None:
            return None
        seen = Seen([SeenLayer()])
        eval_of = Chunk(((images,), {}), chunk.batch, chunk.position)
        pass_chunk(feeder, [first], eval_of, seen)
        found: float | None = figures_of(first, seen.layers[0])["shift_mean"]
        return found

    return look_at_inputs(model, chunk.content[0][0], shift)


def _as_in_training(
    model: nn.Module, feeder: Feeder, sites: Sequence[BatchNormSite], seen: Seen
) -> tuple[float | None, Leakage | None, list[str]]:
    """Return the gap between the modes and the leakage, as live layers would have them, and why one is missing."""
    chunk = seen.chunks[0]
    fewest = min((len(chunk) * layer.positions for layer in seen.layers if layer.positions), default=2)
    if not sites:
        return None, None, []
    if fewest < 2:
        return None, None, ["train/eval gap and leakage: a layer would get one value a channel"]
    try:
        in_eval = feeder(chunk)
        with as_in_training([site.module for site in sites]):
            gap = output_gap(in_eval, feeder(chunk), len(chunk))
    except Exception as error:
        return (
            None,
            None,
            [f"train/eval gap and leakage: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"],
        )
    alike = len(seen.chunks) > 1 and chunk.shape_key is not None and chunk.shape_key == seen.chunks[1].shape_key
    if not alike or len(chunk) < 2:
        return gap, None, ["leakage: it takes two batches of two images or more, of one shape"]
    run = feeder.forward or (lambda net, content: net(*content[0], **content[1]))
    one, two = (part[: len(chunk)] for part in seen.chunks)
    return gap, measure_leakage(model, one.content, two.content, forward=run, device=feeder.device), []


def _labels_of_first(seen: Seen) -> list[int]:
    """Return the labels of the images of the first batch."""
    if len(seen.labels) != seen.images:
        return []
    number = seen.chunks[0].batch[0]
    return [label for label, batch in zip(seen.labels, seen.numbers, strict=True) if batch == number]


def _family(model: nn.Module) -> str:
    """Return the architecture that timm has noted in the model, or a part of it; else the class name."""
    for module in model.modules():
        config = getattr(module, "pretrained_cfg", None)
        name = config.get("architecture") if isinstance(config, dict) else None
        if name:
            return str(name)
    return type(model).__name__


def _train_images(loader: Iterable[Any], seen: Seen) -> int | None:
    """Return how many images the training set has, as far as the loader tells."""
    data = getattr(loader, "dataset", None)
    if isinstance(data, Sized):
        return known_length(data)
    return sum(seen.sizes) if seen.whole else None
