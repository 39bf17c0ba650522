"""Replace the statistics of BatchNorm layers by those of other data."""

from __future__ import annotations

import contextlib
import fnmatch
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from finetune_bn.errors import FinetuneBNError, NoBatchNormMatched, UnsupportedLayer, complaint
from finetune_bn.layers.sites import BatchNormSite, find_batch_norms, find_lookalikes, why_left_alone
from finetune_bn.layers.statistics import Statistics, statistics_of, store, why_no_statistics
from finetune_bn.layers.weights_seen import renew_weights, trained_since
from finetune_bn.recalibration.bank import StatisticsBank
from finetune_bn.recalibration.measured_layer import MeasuredLayer
from finetune_bn.recalibration.measurement import Measuring
from finetune_bn.recalibration.record import LayerRecord, Recalibration
from finetune_bn.recalibration.settings import How, Mode, Part, RecalibrationSettings
from finetune_bn.utilities.batches import Feeder, Forward, Mask, check_batches
from finetune_bn.utilities.probe import at_work_on, undisturbed, unwrapped


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    source: Iterable[Any] | None = None,
    layers: str | Sequence[str] = "*",
    mode: Mode = "auto",
    how: How = "renormalize",
    part: Part = "both",
    prior: float = 0,
    max_samples: int | None = None,
    min_samples: int = 8,
    tolerance: float | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    keep_batches: bool | None = None,
    mask: Mask | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    progress: bool | None = None,
) -> Recalibration:
    """Give the BatchNorm layers of a model, live or frozen, the statistics of the data in `batches`.

    Only the layers chosen measure; everything else (dropout, drop path, other BatchNorm layers) is in eval mode.
    Moments are pooled over all images and processes (law of total variance, Chan's formula). All happens before
    anything is written: after an error the model is what it was, and so are modes, hooks and random states in any case.

    Args:
        model: any module on any device; a DDP wrapper is looked through. Autocast is that of the caller.
        batches: a DataLoader or any iterable of tensors [N, ...], tuples that start with one, or dicts. It should be
            i.i.d. over the data that the model is to work on; one that is not is warned of. In a distributed run
            each process passes its own part; parts may differ in size, also be empty.
        source: batches of the data that the network was trained on last, for one that was fine-tuned with frozen
            layers: it works by the statistics of its pretraining, and to replace those by the target's destroys it.
            With `source` the layers first get the source's statistics, the function preserved.
        layers: name patterns of the layers to recalibrate, as `layer4.*`; all by default.
        mode: `exact` moves all images through the model in lock-step, layer by layer, normalized by the pooled
            statistics of all of them: the result does not depend on how they are cut, ordered or spread over
            processes. `one_pass` normalizes each chunk by its own statistics (PreciseBN, Wu and Johnson 2021,
            section 3.1), so what comes behind the first layer depends on the size of the chunks. `auto` is exact
            where the activations of all images fit in memory.
        how: `renormalize` keeps gamma and beta and changes the function (AdaBN, Li et al. 2016); `preserve` keeps the
            function and solves gamma and beta anew.
        part: `both`, or the `mean` or the `var` (variance) alone.
        prior: weight of the statistics that the layers have now, in images: with n images they keep the share
            prior / (prior + n) (Schneider et al. 2020, section 3), and what lies between the means is variance too.
        max_samples: take so many images at most, over all processes together.
        min_samples: fewer images are an error.
        tolerance: stop when the standard error of the statistics of every layer is at most this, in units of
            sqrt(var + eps) (mean) and relative to var + eps (variance); root mean square over channels.
        batch_size: images that `one_pass` normalizes together; None: as many as fit in memory, 1,024 at most.
        memory: bytes for activations that wait in `exact`; None: half of what the device has free.
        keep_batches: True passes batches to the model as they come, one after the other. False cuts and joins them to
            the size that suits the machine. None does so unless a trial with four images shows that it changes what
            layers see: where the first dimension is not images (clips x frames, bags, time first).
        mask: `(batch)` that returns which values count, for batches that are padded: a bool tensor [N, positions...]
            of the positions that BatchNorm layers see, or several for layers that see different numbers of them. For
            lengths: `mask=lambda batch: torch.arange(batch[0].shape[2]) < batch[1][:, None]`.
        forward: `(model, batch)` that passes a batch to the model; None takes the first tensor of a tuple or list,
            and of a dict what `model.forward` takes. With it a batch may be anything: lists of images and targets,
            padded sequences with lengths, a graph library's batch; what is not tensors with an image in each row is
            not cut.
        device: where batches are moved to; None: where the model is.
        group: process group over which statistics are pooled; None: all processes, where there are several.
        progress: show a progress bar; None: on a terminal.

    Returns:
        What was measured in each layer, before and after.

    Raises:
        FinetuneBNError: an argument, a batch or the model is none that this can work with; too few images; NaN or
            infinite activations. Nothing was changed then.
    """
    settings = RecalibrationSettings(
        mode, how, part, prior, max_samples, min_samples, tolerance, batch_size, memory, keep_batches
    )
    model = unwrapped(model)
    patterns = _patterns(layers)
    check_batches(batches)
    feeder = Feeder(model, forward, device, bool(keep_batches), mask)
    with at_work_on(model), contextlib.ExitStack() as undo:
        if source is not None:
            if how == "preserve":
                raise FinetuneBNError(complaint("source", "batches", "None with how='preserve'", "It is that step."))
            undo.enter_context(StatisticsBank.restoring(model))
            first = replace(settings, how="preserve", part="both", prior=0, tolerance=None)
            _recalibrate(model, check_batches(source, "source"), patterns, first, feeder, group, progress)
        stale = [] if source is not None or how == "preserve" else trained_since(model)
        record = _recalibrate(model, check_batches(batches), patterns, settings, feeder, group, progress)
        undo.pop_all()
        record = _finish(model, record, stale)
    for warning in record.warnings:
        warnings.warn(f"recalibrate: {warning}", stacklevel=2)
    return record


def _recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    patterns: tuple[str, ...],
    settings: RecalibrationSettings,
    feeder: Feeder,
    group: torch.distributed.ProcessGroup | None,
    progress: bool | None,
) -> Recalibration:
    """Measure, and write when everything went well."""
    preserve = settings.how == "preserve"
    sites, left_alone = _choose(model, patterns, settings.how)
    measured = [MeasuredLayer(site.names[0], site.module, statistics_of(site.module)) for site in sites]
    run = Measuring(model, measured, settings, feeder, group)
    with undisturbed(model, feeder.functions) as state:
        run.run(batches, state, progress)
        after = run.statistics()
        for site, statistics in zip(sites, after, strict=True):
            _check_storable(site, statistics)
    idle = [site.names[0] for site, statistics in zip(sites, after, strict=True) if statistics is None]
    if len(idle) == len(sites):
        raise NoBatchNormMatched(
            complaint("layers", patterns, "layers that the batches reach: none of these was called")
        )
    if idle:
        run.warnings.append(f"no data reached {', '.join(idle[:8])}: {len(idle)} layers keep the statistics they had")
    rows = []
    for number in run.collector.order or range(len(sites)):
        new = after[number]
        if new is not None:
            store(sites[number].module, new, preserve=preserve)
            rows.append(_row(sites[number], measured[number].before, new, run, number))
    alone = (*left_alone, *((name, "was not reached by the data") for name in idle))
    used = "exact" if run.exact or preserve else "one_pass"
    return Recalibration(used, settings.how, run.images, tuple(rows), alone, tuple(run.warnings))


def _finish(model: nn.Module, record: Recalibration, stale: Sequence[nn.Module]) -> Recalibration:
    """Warn of layers whose old statistics the network was trained by; from now on they have those of today."""
    measured = {row.names[0]: model.get_submodule(row.names[0]) for row in record.rows}
    names = [name or "(root)" for name, layer in measured.items() if any(layer is each for each in stale)]
    renew_weights(model, measured.values())
    if not names:
        return record
    some = ", ".join(names[:4]) + (", ..." if names[4:] else "")
    warning = (
        f"the weights in front of {len(names)} layers ({some}) were trained while the statistics of these were frozen: "
        "the network works by those, and loses its function where they are replaced by others. Pass source=, batches "
        "of the data that it was trained on, or how='preserve'"
    )
    return replace(record, warnings=(*record.warnings, warning))


def _patterns(layers: object) -> tuple[str, ...]:
    patterns = (layers,) if isinstance(layers, str) else layers
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise FinetuneBNError(complaint("layers", layers, "a name pattern such as 'layer4.*', or a list of them"))
    return tuple(patterns)


def _choose(
    model: nn.Module, patterns: tuple[str, ...], how: How
) -> tuple[list[BatchNormSite], tuple[tuple[str, str], ...]]:
    """Return the layers to recalibrate, and (name, reason) of those that are not.

    Raises:
        NoBatchNormMatched: there is none, or a pattern matches none.
        UnsupportedLayer: a frozen layer has lost the statistics that are to be replaced.
    """
    sites = find_batch_norms(model)
    if not sites:
        others = [f"{name or '(root)'} {why_left_alone(module)}" for name, module in find_lookalikes(model)]
        remedy = f"{len(others)} layers are left alone: {others[0]}." if others else ""
        raise NoBatchNormMatched(complaint("model", type(model).__name__, "a model with BatchNorm layers", remedy))
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for site in sites for name in site.names):
            known = ", ".join(site.names[0] or "(root)" for site in sites[:4]) + ", ..." * (len(sites) > 4)
            remedy = f"There are: {known}."
            raise NoBatchNormMatched(complaint("layers", pattern, "a pattern that matches a BatchNorm layer", remedy))
    chosen, alone = [], []
    for site in sites:
        name = site.names[0]
        if not any(fnmatch.fnmatchcase(n, pattern) for n in site.names for pattern in patterns):
            alone.append((name, "was not chosen"))
            continue
        trouble = why_no_statistics(site.module, preserve=how == "preserve")
        if trouble is None:
            chosen.append(site)
        elif "are gone" in trouble:
            raise UnsupportedLayer(f"{name or '(root)'} ({site.kind}) {trouble}")
        else:
            alone.append((name, trouble))
    for name, module in find_lookalikes(model):
        alone.append((name, why_left_alone(module)))
    if not chosen:
        reasons = "; ".join(f"{name or '(root)'} {reason}" for name, reason in alone[:4])
        raise NoBatchNormMatched(complaint("layers", patterns, "a layer that can be recalibrated", f"{reasons}."))
    return chosen, tuple(alone)


def _check_storable(site: BatchNormSite, statistics: Statistics | None) -> None:
    """Raise where the layer's own dtype cannot hold what was measured: float16 ends at 65,504."""
    if statistics is None:
        return
    for name, value in (("running_mean", statistics.mean), ("running_var", statistics.var)):
        dtype = site.module.get_buffer(name).dtype
        if not torch.isfinite(value.to(dtype)).all():
            given = f"a {name} of {float(value.abs().max()):.3g} for layer {site.names[0]!r}"
            raise FinetuneBNError(
                complaint("model", given, f"what {dtype} holds", "Keep BatchNorm layers in float32: layer.float().")
            )


def _row(site: BatchNormSite, before: Statistics, after: Statistics, run: Measuring, number: int) -> LayerRecord:
    return LayerRecord(
        site.names,
        site.kind,
        int(run.pooled[number][0].count),
        before.mean.cpu(),
        before.var.cpu(),
        after.mean.cpu(),
        after.var.cpu(),
        after.eps,
        run.standard_error(number),
    )
