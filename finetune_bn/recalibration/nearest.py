"""Tell which of several domains images are from by their activations, without labels of the domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finetune_bn.errors import BadData, complaint
from finetune_bn.functional.divergence import normal_divergence
from finetune_bn.functional.moments import accumulator
from finetune_bn.layers.sites import BatchNormSite
from finetune_bn.layers.statistics import normalize, statistics_of
from finetune_bn.recalibration.rehearsal import patched
from finetune_bn.utilities.batches import Chunk, Feeder
from finetune_bn.utilities.probe import undisturbed

# A layer that sees fewer values of a channel than this says more of the noise than of the domain.
_VALUES = 16

DomainStatistics = Mapping[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def domain_distances(
    sites: list[BatchNormSite], feeder: Feeder, batch: Any, domains: list[DomainStatistics], *, each: bool
) -> Tensor:
    """Return how far the activations of a batch are from the statistics of domains.

    The batch passes the network once for each domain, normalized by its statistics; what arrives at a layer is compared
    with what the domain keeps there. Mean over channels and layers of `normal_divergence`. Layers at which fewer than
    16 values of a channel arrive count only where there are no others.

    Args:
        sites: the BatchNorm layers.
        feeder: passes the batch to the model.
        batch: the batch.
        domains: mean and variance of each layer by its name, for each domain.
        each: for each image by itself; else for all together.

    Returns:
        float64 [domains], or with `each` [images, domains].

    Raises:
        BadData: the batch holds no images, what arrives is not finite, or no layer sees the images as rows.
    """
    chunk = feeder.chunk(batch, 0)
    with undisturbed(feeder.model, feeder.functions) as state:
        found = []
        for domain in domains:
            found.append(_distance(sites, feeder, chunk, domain, each))
            state.restore()
    distances = torch.stack(found, dim=-1)
    if not torch.isfinite(distances).all():
        raise BadData(complaint("batch", "activations with NaN or inf", "finite ones"))
    return distances


def _distance(sites: list[BatchNormSite], feeder: Feeder, chunk: Chunk, domain: DomainStatistics, each: bool) -> Tensor:
    measured: list[tuple[int, Tensor]] = []

    def arrive(number: int, x: Tensor) -> Tensor:
        site = sites[number]
        now = statistics_of(site.module)
        mean, var = (t.to(now.mean.device) for t in domain[site.names[0]])
        if x.numel() and (not each or len(x) == len(chunk)):
            wide = x.detach().to(accumulator(x)).flatten(2) if x.dim() > 2 else x.detach().to(accumulator(x))[..., None]
            over = (2,) if each else (0, 2)
            own = torch.var_mean(wide, dim=over, correction=0)
            values = wide.shape[2] * (1 if each else len(wide))
            measured.append((values, normal_divergence(own[1], own[0], mean, var, float(now.eps)).double()))
        return normalize(site.module, x, now.moved_to(mean, var, preserve=False))

    with patched([site.module for site in sites], arrive):
        feeder(chunk)
    if not measured:
        allowed = f"images that reach a layer as rows, [{len(chunk)}, C, ...]" if each else "images that reach a layer"
        raise BadData(complaint("batch", f"{len(chunk)} images", allowed))
    enough = [distance for values, distance in measured if values >= _VALUES]
    return torch.stack(enough or [distance for _, distance in measured]).mean(dim=0)
