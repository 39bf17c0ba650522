"""Fit layers that were converted to GroupNorm to images, so that they return what their BatchNorm returned."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.conversion.producers import find_feeds
from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.group_norm.fit import Fitting
from finetune_bn.group_norm.record import Calibration, LayerFit
from finetune_bn.group_norm.twin import batch_norm_twin, group_norm_sites
from finetune_bn.layers.balance import relative_name
from finetune_bn.layers.group_norm import GroupNorm, eval_batch_norm
from finetune_bn.layers.norm_act import behind_norm
from finetune_bn.layers.sites import BatchNormSite, find_batch_norms
from finetune_bn.layers.statistics import statistics_of, why_no_statistics
from finetune_bn.recalibration.collector import cut
from finetune_bn.recalibration.measured_layer import MeasuredLayer
from finetune_bn.recalibration.rehearsal import Findings, Rehearsal
from finetune_bn.utilities.batches import Chunk, Feeder, Forward, Stock, check_batches, join
from finetune_bn.utilities.checks import number
from finetune_bn.utilities.lockstep import MOST_PASSES, DifferentPaths, caller_settings, meet, run_in_lockstep
from finetune_bn.utilities.module_state import ModuleState
from finetune_bn.utilities.probe import Probe, undisturbed, unwrapped
from finetune_bn.utilities.processes import Ranks
from finetune_bn.utilities.progress import progress_bar

_MIN_IMAGES = 8


def calibrate_group_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_samples: int | None = 256,
    balance: bool = True,
    keep_batches: bool | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Fit weight and bias of the layers that `ToGroupNorm` made, layer by layer, to images without labels.

    The BatchNorm network (frozen) and the model move all images side by side, and no image goes on before a layer is
    fitted: with z the GroupNorm of the layer's input, without weight and bias, in the network as it is fitted so far,
    and y the output of its BatchNorm, weight and bias are those with which the mean of each channel is that of y and
    the standard deviation nearly so (`GroupMoments.match`). Where groups are "auto" or eps is "normalize", those of
    `CANDIDATES` and `EPS_CANDIDATES` (in `group_norm.fit`) with the smallest error are taken for each layer. One
    pass; the result does not depend on how the images are cut into batches, or spread over processes, but for
    rounding, which may tip the choice between two factors.

    Before a layer is fitted, the output channels of the convolution or linear map in front are balanced, that is
    multiplied by powers of two with a sign, which the BatchNorm network does not notice and `revert` undoes exactly.
    They are chosen such that the mean that GroupNorm subtracts from an image differs little between images
    (`finetune_bn.functional.balancing`). It goes further than the fit does.

    Call it before the training: the BatchNorm network is the model with the BatchNorm layers that it had. Memory is
    that of the activations which all images have at one place of both networks; `max_samples` bounds it.

    Args:
        model: a model behind `convert(model, ToGroupNorm(...))`, on any device; a DDP wrapper is looked through.
            Autocast is that of the caller.
        batches: a DataLoader or any iterable of tensors [N, ...], tuples that start with one, or dicts; i.i.d. images
            of the kind that the model is to work on. In a distributed run each process passes its own part.
        max_samples: take so many images at most, over all processes together; None takes all.
        balance: False leaves the maps in front of the layers as they are.
        keep_batches: whether batches stay as they come, and are not cut and joined; None: where a trial shows that they
            have to, see `recalibrate`.
        forward: `(model, batch)` that passes a batch to the model; None takes the first tensor of a tuple or list, and
            of a dict what `model.forward` takes. See `recalibrate` for batches of other kinds.
        device: where batches are moved to; None: where the model is.
        group: process group; None: all processes, where there are several.
        progress: show a progress bar; None: on a terminal.

    Returns:
        Groups and errors of each layer, before and after.

    Raises:
        FinetuneBNError: an argument, a batch or the model is none that this can work with; too few images; NaN or
            infinite activations. Nothing was changed then.
    """
    model = unwrapped(model)
    sites = group_norm_sites(model)
    check_batches(batches)
    max_samples = number("max_samples", max_samples, least=_MIN_IMAGES, whole=True, none=True)
    if not isinstance(balance, bool):
        raise FinetuneBNError(complaint("balance", balance, "True or False"))
    if keep_batches is not None and not isinstance(keep_batches, bool):
        raise FinetuneBNError(complaint("keep_batches", keep_batches, "True, False or None"))
    student = Feeder(model, forward, device, bool(keep_batches))
    ranks = Ranks(group, student.device)
    settings = caller_settings(student.device)  # with the caller's autocast, which is off in what follows
    share = max_samples if max_samples is None else -(-max_samples // ranks.world)
    with undisturbed(model), progress_bar("Fitting GroupNorm", "layers", len(sites), progress) as report:
        twin = batch_norm_twin(model)
        teacher = Feeder(twin, forward, device)
        stock = Stock(check_batches(batches), student, share)
        found = _rehearse(twin, teacher, stock, settings, keep_batches, ranks)
        chunks = _pieces(list(stock.up_to(float("inf"))), model, found, student.device)
        counts = [int(row[0]) for row in ranks.agree(stock.images)]
        if sum(counts) < _MIN_IMAGES or not min(counts):
            given = f"{sum(counts)} images" if min(counts) else "no images on one of the processes"
            raise BadData(complaint("batches", given, f"at least {_MIN_IMAGES} images, and some on each process"))
        layers = [site.module for site in sites if isinstance(site.module, GroupNorm)]
        others = [twin.get_submodule(site.names[0]) for site in sites]
        reasons = _why_not_balanced(model, sites, student, chunks[0]) if balance else {}
        fitting = Fitting(layers, _producers(model, sites, reasons), ranks, report)
        jobs = [partial(feeder, chunk) for feeder in (teacher, student) for chunk in chunks]
        with _meeting(others, layers), fitting.undone_on_error():
            try:
                run_in_lockstep(jobs, fitting.pool, settings)
            except DifferentPaths as error:
                allowed = "a model that calls its layers in the same order for every batch"
                raise FinetuneBNError(complaint("model", type(model).__name__, allowed)) from error
    for layer, chosen in zip(layers, fitting.chosen, strict=True):
        chosen.give(layer)  # once more: the block above puts back what it finds changed in a module
    rows = []
    for n, errors in fitting.errors.items():
        old, new = fitting.before[n], fitting.chosen[n]
        changes = old.groups, new.groups, old.eps, new.eps
        why = reasons.get(n, ("", "not asked for"))[1]
        rows.append(LayerFit(sites[n].names, sites[n].num_features, *changes, fitting.contrast(n), *errors, why))
    alone = [site.names[0] for n, site in enumerate(sites) if n not in fitting.errors]
    return Calibration(sum(counts), tuple(rows), tuple(alone))


def _rehearse(
    twin: nn.Module,
    teacher: Feeder,
    stock: Stock,
    settings: Callable[[], contextlib.ExitStack],
    keep: bool | None,
    ranks: Ranks,
) -> Findings:
    """Find out by a few images whether batches can be cut, and images pass one by one, in the BatchNorm network."""
    sites = [site for site in find_batch_norms(twin) if why_no_statistics(site.module, preserve=False) is None]
    layers = [MeasuredLayer(site.names[0], site.module, statistics_of(site.module)) for site in sites]
    chunks, found = stock.first(2), Findings()
    if chunks and layers and (len(chunks) > 1 or len(chunks[0]) > 1):
        state = ModuleState(twin, teacher.functions)
        found = Rehearsal(layers, teacher, state, settings).look(chunks, keep=keep, side_by_side=True)
    rows = ranks.agree(found.parts_differ, found.passes_mix, found.kept_outside)
    differ, mix, outside = (any(row[i] for row in rows) for i in range(3))
    if differ:
        stock.keep_batches()
    return Findings(differ, mix, found.kept_in, outside)


def _pieces(chunks: list[Chunk], model: nn.Module, found: Findings, device: torch.device) -> list[Chunk]:
    """Return the images as the passes that stand side by side, in both networks: one, where passes disturb each other.

    Raises:
        FinetuneBNError: they disturb each other, and one pass cannot hold all images, or the networks share what is
            kept.
    """
    if not found.passes_mix:
        return cut(chunks, device, MOST_PASSES // 2)
    where = ", ".join(found.kept_in[:6]) or "something outside of its modules"
    given = f"{type(model).__name__}, which keeps something between its layers ({where})"
    if found.kept_outside:
        allowed = (
            "one that keeps it in its modules, of which each of the two networks that run side by side has its own"
        )
        raise FinetuneBNError(complaint("model", given, allowed))
    if len({chunk.shape_key for chunk in chunks}) > 1 or (len(chunks) > 1 and chunks[0].shape_key is None):
        remedy = "Pass one batch, or images of one size."
        raise FinetuneBNError(complaint("model", given, "one whose batches can be joined to a single one", remedy))
    return [join(chunks)] if chunks else []


@dataclass(frozen=True)
class _ChunkProbe(Probe):
    """A chunk of images, passed to the model as the feeder does."""

    feeder: Feeder | None = None
    chunk: Chunk | None = None

    def call(self, model: nn.Module) -> Any:
        assert self.feeder is not None
        assert self.chunk is not None
        return self.feeder(self.chunk)


def _why_not_balanced(
    model: nn.Module, sites: list[BatchNormSite], feeder: Feeder, chunk: Chunk
) -> dict[int, tuple[str, str]]:
    """Return, by number of the layer, the name of the map in front of it, or "" and why none can be balanced."""
    few = chunk[:2] if chunk.shape_key else chunk
    feeds = find_feeds(model, sites, [_ChunkProbe("", given=False, feeder=feeder, chunk=few)])
    found = {}
    for n, site in enumerate(sites):
        feed = feeds.get(site.names[0])
        why = "what is in front of it is not known" if feed is None else feed.why_not
        if not why and site.module.source.running_var is None:  # type: ignore[union-attr]
            why = "its BatchNorm had no running statistics"
        if not why and feed is not None and model.get_parameter(f"{feed.producer}.weight").dtype == torch.float16:
            why = f"the weight of {feed.producer} is in float16, which is too narrow to scale it and take that back"
        found[n] = ("" if why or feed is None else feed.producer, why)
    return found


def _producers(
    model: nn.Module, sites: list[BatchNormSite], found: dict[int, tuple[str, str]]
) -> dict[int, tuple[str, nn.Module]]:
    """Return, by number of the layer, where the map to balance is, as seen from the layer, and that map."""
    return {
        n: (relative_name(name, sites[n].names[0]), model.get_submodule(name)) for n, (name, _) in found.items() if name
    }


@contextlib.contextmanager
def _meeting(batch_norms: Sequence[nn.Module], group_norms: Sequence[GroupNorm]) -> Iterator[None]:
    """Let the layers of both networks wait for each other, one bringing its output, the other its input."""

    def teach(number: int, layer: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(layer, _BatchNorm)
        y = eval_batch_norm(layer, x)
        meet(number, y)
        return behind_norm(layer, y)

    def learn(number: int, x: Tensor) -> Tensor:
        factors = meet(number, x)
        layer = group_norms[number]
        if torch.is_tensor(factors):  # as the map in front will do from the next pass on
            x = x * factors.to(x).view([-1] + [1] * (x.dim() - 2))
        y: Tensor = type(layer).forward(layer, x)
        return y

    try:
        for number, (bn, layer) in enumerate(zip(batch_norms, group_norms, strict=True)):
            bn.forward = partial(teach, number, bn)
            layer.forward = partial(learn, number)  # type: ignore[method-assign]
        yield
    finally:
        for module in (*batch_norms, *group_norms):
            vars(module).pop("forward", None)
