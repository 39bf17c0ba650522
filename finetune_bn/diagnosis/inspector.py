"""What the BatchNorm layers of a network see of a batch, layer by layer, and what that says about their statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.functional.design_effect import Components, LabelCounts, design_effect
from finetune_bn.functional.moments import measure_images
from finetune_bn.layers.ghost import GhostBatchNorm
from finetune_bn.layers.renorm import BatchRenorm
from finetune_bn.layers.sites import BatchNormSite
from finetune_bn.layers.statistics import statistics_of, why_no_statistics

# A channel whose variance is this share of eps leaves BatchNorm with a hundredth of the spread it should have.
DEAD = 1e-4
# Components of variance are averages over about so many batches: those of a single one are mostly noise.
_MEMORY = 8
# Fewer batches do not tell by how much labels vary from batch to batch.
_BATCHES_TO_COUNT = 8
# Median of the absolute value of a standard normal variable.
_MEDIAN_OF_NORMAL = 0.6745


@dataclass(frozen=True)
class LayerLook:
    """One layer and one batch; None: cannot be told.

    Attributes:
        name: its first name in the model.
        kind: class name.
        by_batch: whether in training it normalizes all images of the batch together.
        tracks: whether in training its running statistics follow the batches.
        images: images that it normalizes together, those of other processes included.
        drift: distance of the batch mean from the running mean in running standard deviations, root mean square over
            channels.
        drift_z: the same in standard errors of the batch mean, from the median channel; about 1 where nothing drifted.
        log_var_ratio: logarithm of the ratio of batch and running variance, averaged over channels.
        rho: between-label share of the variance of per-image channel means.
        deff: design effect of the batches.
        n_eff: how many independent images a batch is worth.
        running_var_bias: how far from the variance of the population running_var will settle, relative to it.
        channels: number of channels.
        dead: how many of them have next to no variance.
        died: how many of those had some in training's beginning, and had none the last time either.
        not_finite: how many hold NaN or infinite values.
    """

    name: str
    kind: str
    by_batch: bool
    tracks: bool
    images: int
    drift: float | None
    drift_z: float | None
    log_var_ratio: float | None
    rho: float | None
    deff: float | None
    n_eff: float | None
    running_var_bias: float | None
    channels: int
    dead: int
    died: int
    not_finite: int


@dataclass(frozen=True)
class LayerInput:
    """What a layer got of a batch, on the CPU.

    Attributes:
        means: means over the positions of each image, [N, C], float64.
        within: variance of the values of an image about its mean, averaged over images, [C], float64.
        positions: values of a channel in one image.
    """

    means: Tensor
    within: Tensor
    positions: int

    @cached_property
    def variance(self) -> Tensor:
        """Biased variance of all values, [C]."""
        return self.means.var(0, correction=0) + self.within


def layer_inputs(
    sites: Sequence[BatchNormSite], images: int, run: Callable[[], Any]
) -> tuple[list[LayerInput | None], Any]:
    """Return what arrives at each layer while `run` passes `images` images through the model, and what that returns.

    The first call of a layer counts. None for a layer that is not called, or not with a row an image.
    """
    found: dict[int, tuple[Tensor, Tensor, int]] = {}

    def watch(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args else None
            if number in found or not torch.is_tensor(x) or x.dim() < 2 or len(x) != images or not x.numel():
                return
            of_images = measure_images(x.detach())[1]
            found[number] = (of_images.absolute, of_images.var.mean(0, dtype=torch.float64), of_images.positions)

        return hook

    handles = [site.module.register_forward_pre_hook(watch(number)) for number, site in enumerate(sites)]
    try:
        output = run()
    finally:
        for handle in handles:
            handle.remove()
    inputs: list[LayerInput | None] = [None] * len(sites)
    if found:
        # One transfer: each would wait for all that the device has still to do.
        packed = torch.cat([torch.cat([means, within[None]]) for means, within, _ in found.values()], 1).cpu()
        start = 0
        for number, (_, within, positions) in found.items():
            part = packed[:, start : start + len(within)]
            start += len(within)
            inputs[number] = LayerInput(part[:-1], part[-1] if positions > 1 else torch.zeros_like(part[-1]), positions)
    return inputs, output


def worth_of(
    known: Components | None, alive: Tensor, images: int, positions: int, counts: LabelCounts
) -> tuple[float | None, float | None, float | None]:
    """Return rho, DEFF and the bias of the running variance of batches like those counted, as far as labels tell.

    Args:
        known: where the variance of a layer's inputs comes from; None where labels do not tell.
        alive: which channels count, [C].
        images: images that the layer normalizes together.
        positions: values of a channel in one image.
        counts: the labels of the batches.
    """
    group = counts.group_size if counts.batches >= _BATCHES_TO_COUNT else None
    if known is None or group is None or not alive.any():
        return None, None, None
    # Channels count alike, whatever their scale; shares are taken last, of averages, or they would be biased.
    known = known.among(counts.diversity)
    label, image, within = (
        (part / known.variance.clamp_min(torch.finfo(part.dtype).tiny))[alive].mean()
        for part in (known.label, known.image, known.within)
    )
    layer = Components(label.clamp_min(0), image, within)
    rho = float(layer.rho)
    if not layer.variance.isfinite() or not 0 <= rho <= 1:
        return None, None, None
    settled = layer.expected_running_var(images, positions, group)
    bias = float(settled / layer.variance - 1) if images * positions > 1 else None
    return rho, float(design_effect(rho, group)), bias


class Inspector:
    """Judges layers by the batches that it is shown now and then.

    Args:
        world_size: number of processes over which SyncBatchNorm layers normalize.
    """

    def __init__(self, world_size: int = 1) -> None:
        self.counts = LabelCounts()
        self._world_size = world_size
        self._components: dict[str, tuple[int, Components]] = {}
        self._alive: dict[str, Tensor] = {}
        self._dead: dict[str, Tensor] = {}

    def begin(self, sites: Sequence[BatchNormSite]) -> None:
        """Note which channels have a variance, by the running statistics of today."""
        for site in sites:
            if why_no_statistics(site.module, preserve=False) is None:
                statistics = statistics_of(site.module)
                self._alive[site.names[0]] = (statistics.var > DEAD * statistics.eps).cpu()

    def judge(self, site: BatchNormSite, seen: LayerInput, labels: Tensor | None, training: bool) -> LayerLook:
        """Return what a batch tells about a layer.

        Args:
            site: the layer.
            seen: what it got.
            labels: one label an image of the batch.
            training: whether the layer is in training mode in training steps.
        """
        layer, name = site.module, site.names[0]
        images = len(seen.means) * (self._world_size if isinstance(layer, nn.SyncBatchNorm) else 1)
        eps = float(layer.eps)  # type: ignore[arg-type]
        finite = seen.variance.isfinite()
        dead = finite & (seen.variance <= DEAD * eps)
        alive = finite & ~dead
        before, self._dead[name] = self._dead.get(name, torch.zeros_like(dead)), dead
        died = dead & before & self._alive.get(name, torch.zeros_like(dead))
        rho, deff, bias = self._by_labels(name, seen, alive, labels, images)
        drift, drift_z, log_var_ratio = self._drift(layer, seen, alive, deff or 1.0)
        live = isinstance(layer, _BatchNorm) and (training or layer.running_mean is None)
        return LayerLook(
            name=name,
            kind=site.kind,
            by_batch=live and not isinstance(layer, (GhostBatchNorm, BatchRenorm)),
            tracks=live and layer.running_mean is not None and bool(layer.momentum != 0),
            images=images,
            drift=drift,
            drift_z=drift_z,
            log_var_ratio=log_var_ratio,
            rho=rho,
            deff=deff,
            n_eff=None if deff is None else images / deff,
            running_var_bias=bias,
            channels=len(dead),
            dead=int(dead.sum()),
            died=int(died.sum()),
            not_finite=int((~finite).sum()),
        )

    def _by_labels(
        self, name: str, seen: LayerInput, alive: Tensor, labels: Tensor | None, images: int
    ) -> tuple[float | None, float | None, float | None]:
        """Return rho, DEFF and the bias of the running variance, as far as labels tell."""
        new = None if labels is None else Components.estimate(seen.means, seen.within, labels)
        looks, known = self._components.get(name, (0, new))
        if new is not None and known is not None:
            looks = min(looks + 1, _MEMORY)
            known = known.blend(new, 1 / looks)
            self._components[name] = looks, known
        return worth_of(known, alive, images, seen.positions, self.counts)

    def _drift(
        self, layer: nn.Module, seen: LayerInput, alive: Tensor, deff: float
    ) -> tuple[float | None, float | None, float | None]:
        if why_no_statistics(layer, preserve=False) is not None or not alive.any():
            return None, None, None
        statistics = statistics_of(layer)
        mean, var, eps = statistics.mean.double().cpu(), statistics.var.double().cpu(), statistics.eps
        distance = (seen.means.mean(0) - mean)[alive]
        log_ratio = ((seen.variance + eps) / (var + eps)).log()[alive].mean()
        drift = (distance / (var[alive] + eps).sqrt()).square().mean().sqrt()
        images = len(seen.means)
        if images < 2:
            return float(drift), None, float(log_ratio)
        error = (seen.means.var(0)[alive] * deff / images).clamp_min(torch.finfo(torch.float64).tiny)
        # Not the mean: a channel that hardly any image activates is many of its own standard errors off.
        drift_z = (distance.square() / error).median().sqrt() / _MEDIAN_OF_NORMAL
        return float(drift), float(drift_z), float(log_ratio)
