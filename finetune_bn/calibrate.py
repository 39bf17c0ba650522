"""Fit layers that were converted to GroupNorm to images, so that they return what their BatchNorm returned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetune_bn.collecting import cut
from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.feeding import Feeder, Forward, check_batches
from finetune_bn.group_functional import GroupMoments, ImagePairs, group_statistics
from finetune_bn.layers.group_norm import GroupNorm
from finetune_bn.layers.norm_act import behind_norm
from finetune_bn.lockstep import FINISHED, DifferentPaths, caller_settings, meet, run_in_lockstep
from finetune_bn.progress import Report, progress_bar
from finetune_bn.ranks import OtherProcessFailed, Ranks
from finetune_bn.recalibrate import _undisturbed, _unwrapped
from finetune_bn.stock import Stock
from finetune_bn.twins import batch_norm_twin, group_norm_sites

# What "auto" chooses from: numbers of groups that divide the channels and leave a group more than one value in an
# image, and eps in units of the variance that the running statistics predict for a group; 0 is the layer's own.
CANDIDATES = (1, 2, 4, 8, 16, 32)
EPS_CANDIDATES = (0.0, 0.1, 0.3, 1.0, 3.0, 9.0)
_MIN_IMAGES = 8


@dataclass(frozen=True)
class LayerFit:
    """One layer before and after.

    Attributes:
        names: all names of the layer in the model.
        num_features: number of channels C.
        groups_before: number of groups before.
        groups: number of groups now.
        eps_before: what was added to variances before.
        eps: what is added to them now.
        error_before: what the layer's output would be off by without its fit, the layers before it fitted: root mean
            square of the difference to the output of its BatchNorm in the BatchNorm network, relative to the standard
            deviation of that.
        error: the same now.
    """

    names: tuple[str, ...]
    num_features: int
    groups_before: int
    groups: int
    eps_before: float
    eps: float
    error_before: float
    error: float


@dataclass(frozen=True)
class Calibration:
    """What `calibrate_group_norm` did; `print` it for a table.

    Attributes:
        images: images of all processes that were used.
        rows: one a layer, in the order in which the images reach them.
        left_alone: names of converted layers that no image reached.
    """

    images: int
    rows: tuple[LayerFit, ...]
    left_alone: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data, for JSON."""
        rows = [{**vars(row), "names": list(row.names)} for row in self.rows]
        return {"images": self.images, "rows": rows, "left_alone": list(self.left_alone)}

    def __str__(self) -> str:
        header = ("layer", "C", "groups", "eps", "error before", "error now")
        body = [
            (
                " = ".join(name or "(root)" for name in row.names),
                str(row.num_features),
                str(row.groups) if row.groups == row.groups_before else f"{row.groups_before} -> {row.groups}",
                f"{row.eps:.2g}" if row.eps == row.eps_before else f"{row.eps_before:.2g} -> {row.eps:.2g}",
                f"{row.error_before:.3f}",
                f"{row.error:.3f}",
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in [header, *body]]
        last = f"; behind the last, {self.rows[-1].error:.3f}" if self.rows else ""
        title = (
            f"{len(self.rows)} GroupNorm layers fitted to {self.images} images: errors in standard deviations of the "
            f"BatchNorm's output{last}"
        )
        alone = [f"left alone: {name or '(root)'} was not reached by the images" for name in self.left_alone]
        return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:], *alone])


def calibrate_group_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_samples: int | None = 256,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Fit weight and bias of the layers that `ToGroupNorm` made, layer by layer, to images without labels.

    The BatchNorm network (frozen) and the model move all images side by side, and no image goes on before a layer is
    fitted: with z the GroupNorm of the layer's input, without weight and bias, in the network as it is fitted so far,
    and y the output of its BatchNorm, weight and bias are those with which the mean of each channel is that of y and
    the standard deviation nearly so (`GroupMoments.match`). Where groups or eps are "auto", those of `CANDIDATES` and
    `EPS_CANDIDATES` with the smallest error are taken for each layer. One pass; the result does not depend on how the
    images are cut into batches, or spread over processes, but for rounding.

    Call it before the training: the BatchNorm network is the model with the BatchNorm layers that it had. Memory is
    that of the activations which all images have at one place of both networks; `max_samples` bounds it.

    Args:
        model: a model behind `convert(model, ToGroupNorm(...))`, on any device; a DDP wrapper is looked through.
            Autocast is that of the caller.
        batches: a DataLoader or any iterable of tensors [N, ...], tuples that start with one, or dicts; i.i.d. images
            of the kind that the model is to work on. In a distributed run each process passes its own part.
        max_samples: take so many images at most, over all processes together; None takes all.
        forward: `(model, batch)` that passes a batch to the model; None takes the first tensor of a tuple or list, and
            of a dict what `model.forward` takes.
        device: where batches are moved to; None: where the model is.
        group: process group; None: all processes, where there are several.
        progress: show a progress bar; None: on a terminal.

    Returns:
        Groups and errors of each layer, before and after.

    Raises:
        FinetuneBNError: an argument, a batch or the model is none that this can work with; too few images; NaN or
            infinite activations. Nothing was changed then.
    """
    model = _unwrapped(model)
    sites = group_norm_sites(model)
    check_batches(batches)
    if max_samples is not None and (isinstance(max_samples, bool) or max_samples < _MIN_IMAGES):
        raise FinetuneBNError(complaint("max_samples", max_samples, f"{_MIN_IMAGES} or more, or None for all"))
    student = Feeder(model, forward, device)
    ranks = Ranks(group, student.device)
    settings = caller_settings(student.device)  # with the caller's autocast, which is off in what follows
    share = max_samples if max_samples is None else -(-max_samples // ranks.world)
    with _undisturbed(model), progress_bar("Fitting GroupNorm", "layers", len(sites), progress) as report:
        twin = batch_norm_twin(model)
        teacher = Feeder(twin, forward, device)
        stock = Stock(check_batches(batches), student, share)
        chunks = cut(list(stock.up_to(float("inf"))), student.device)
        counts = [int(row[0]) for row in ranks.agree(stock.images)]
        if sum(counts) < _MIN_IMAGES or not min(counts):
            given = f"{sum(counts)} images" if min(counts) else "no images on one of the processes"
            raise BadData(complaint("batches", given, f"at least {_MIN_IMAGES} images, and some on each process"))
        layers = [site.module for site in sites if isinstance(site.module, GroupNorm)]
        others = [twin.get_submodule(site.names[0]) for site in sites]
        fitting = _Fitting(layers, ranks, report)
        jobs = [partial(feeder, chunk) for feeder in (teacher, student) for chunk in chunks]
        with _meeting(others, layers), fitting.undone_on_error():
            try:
                run_in_lockstep(jobs, fitting.pool, settings)
            except DifferentPaths as error:
                allowed = "a model that calls its layers in the same order for every batch"
                raise FinetuneBNError(complaint("model", type(model).__name__, allowed)) from error
    for layer, chosen in zip(layers, fitting.chosen, strict=True):
        layer.num_groups, layer.eps = chosen  # once more: the block above puts back what it finds changed in a module
    rows = []
    for n, errors in fitting.errors.items():
        (groups_before, eps_before), (groups, eps) = fitting.before[n], fitting.chosen[n]
        row = LayerFit(sites[n].names, sites[n].num_features, groups_before, groups, eps_before, eps, *errors)
        rows.append(row)
    alone = [site.names[0] for n, site in enumerate(sites) if n not in fitting.errors]
    return Calibration(sum(counts), tuple(rows), tuple(alone))


class _Fitting:
    """Fits each layer to what all images bring there.

    Args:
        layers: the layers, by number.
        ranks: the processes whose images are pooled.
        report: moves the progress bar.

    Attributes:
        before: each layer's number of groups and eps from before.
        chosen: those of now.
        errors: by number of the layer, in the order of their calls: its error before and now.
    """

    def __init__(self, layers: Sequence[GroupNorm], ranks: Ranks, report: Report) -> None:
        self.layers = layers
        self.before = [(layer.num_groups, layer.eps) for layer in layers]
        self.chosen = list(self.before)
        self.errors: dict[int, tuple[float, float]] = {}
        self._affine = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in layers]
        self._sums: dict[int, Tensor] = {}
        self._ranks, self._report = ranks, report

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Give the layers back what they had if the block raises, and tell the other processes."""
        try:
            yield
        except BaseException as error:
            for layer, before, affine in zip(self.layers, self.before, self._affine, strict=True):
                layer.num_groups, layer.eps = before
                _write(layer, *affine)
            if not isinstance(error, OtherProcessFailed):
                self._ranks.fail(1)
            raise

    def pool(self, place: int, brought: list[Tensor]) -> bool | None:
        """Fit a layer: the first half of what was brought are BatchNorm's outputs, the second GroupNorm's inputs."""
        places = {int(row[0]) for row in self._ranks.agree(float(place))}
        if places == {FINISHED}:
            return None
        if len(places) > 1:
            raise DifferentPaths(complaint("model", "one that is called differently on each process", "the same"))
        layer, bn = self.layers[place], self.layers[place].source
        assert bn is not None
        zeros = torch.zeros_like(layer.weight)
        x_pivot, y_pivot = (zeros if t is None else t.detach().to(zeros.device) for t in (bn.running_mean, bn.bias))
        half = len(brought) // 2
        pairs = [ImagePairs.of(x, y, x_pivot, y_pivot) for y, x in zip(brought[:half], brought[half:], strict=True)]
        candidates = self._candidates(place, brought[half])
        sums = torch.stack([sum(p.sums(x_pivot, *each) for p in pairs) for each in candidates])  # type: ignore[misc]
        sums = torch.stack(self._ranks.gather(sums)).sum(0)
        if not torch.isfinite(sums).all():
            given = f"NaN or infinite values at layer number {place + 1} of the converted ones ({layer})"
            raise BadData(complaint("batches", given, "finite activations", "In float16, look for overflow."))
        if place in self._sums:  # a layer that is called again is fitted to all of its calls
            sums = sums + self._sums[place]
        self._sums[place] = sums
        moments = [GroupMoments.of_sums(each, y_pivot) for each in sums]
        fits = [each.match(self._affine[place][0]) for each in moments]
        errors = [each.error(*fit) for each, fit in zip(moments, fits, strict=True)]
        before = moments[-1].error(*self._affine[place])
        best = min(range(len(candidates)), key=lambda i: errors[i])
        layer.num_groups, layer.eps = self.chosen[place] = candidates[best]
        _write(layer, *fits[best])
        self.errors[place] = (before, errors[best])
        self._report(len(self.errors), "")
        return True

    def _candidates(self, place: int, x: Tensor) -> list[tuple[int, float]]:
        """Return the numbers of groups and eps to choose from; the layer's own of before are the last."""
        layer, (own_groups, own_eps) = self.layers[place], self.before[place]
        values, channels, bn = x[0].numel(), layer.num_channels, layer.source
        numbers = [own_groups]
        if layer.settings["groups"] == "auto" and layer.settings["channels_per_group"] is None:
            numbers = [c for c in CANDIDATES if channels % c == 0 and values > c and c != own_groups] + numbers
        found = []
        for number in numbers:
            sizes = [own_eps]
            if layer.settings["eps"] == "auto" and bn is not None and bn.running_mean is not None:
                assert bn.running_var is not None
                variance = float(group_statistics(bn.running_mean, bn.running_var, number)[1].mean())
                sizes = [bn.eps + share * variance for share in EPS_CANDIDATES] + sizes
            found += [(number, size) for size in dict.fromkeys(sizes)]
        return sorted(found, key=lambda each: each == self.before[place])


def _write(layer: GroupNorm, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


@contextlib.contextmanager
def _meeting(batch_norms: Sequence[nn.Module], group_norms: Sequence[GroupNorm]) -> Iterator[None]:
    """Let the layers of both networks wait for each other, one bringing its output, the other its input."""

    def teach(number: int, layer: nn.Module, x: Tensor) -> Tensor:
        y = group_norms[number]._as_batch_norm(x)
        meet(number, y)
        return behind_norm(layer, y)

    def learn(number: int, x: Tensor) -> Tensor:
        meet(number, x)
        layer = group_norms[number]
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
