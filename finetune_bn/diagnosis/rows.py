"""Rows of a diagnosis: layers, from what they got in a pass, and the batches that the images came in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from finetune_bn.diagnosis import remedies
from finetune_bn.diagnosis.eval_pass import Seen, SeenLayer
from finetune_bn.diagnosis.inspector import DEAD, worth_of
from finetune_bn.diagnosis.leakage import Leakage
from finetune_bn.diagnosis.results import BatchDiagnosis, LayerDiagnosis
from finetune_bn.functional.design_effect import Components
from finetune_bn.functional.image_spread import batch_membership_p_value
from finetune_bn.layers.sites import BatchNormSite
from finetune_bn.layers.statistics import statistics_of, why_no_statistics

# Images that the permutation tests compare, and numbers of each that they compare them by.
_COMPARED, _FEATURES = 512, 2048


def rows_of(
    sites: Sequence[BatchNormSite], seen: Seen, live: frozenset[str], leakage: Leakage | None, images: int
) -> tuple[LayerDiagnosis, ...]:
    """Return one row a layer.

    Args:
        sites: the layers.
        seen: what they got of the images.
        live: names of those that will normalize by the batch in training.
        leakage: what was found of it; None: nothing.
        images: images that a layer normalizes together.
    """
    leaks = {row.names: row.leakage for row in leakage.rows} if leakage is not None else {}
    labels = torch.tensor(seen.labels) if len(seen.labels) == seen.images else None
    rows = []
    for site, layer in zip(sites, seen.layers, strict=True):
        figures = figures_of(site, layer)
        rho = deff = bias = None
        whole = layer.means and sum(map(len, layer.means)) == seen.images
        if labels is not None and whole and layer.positions:
            means, within = torch.cat(layer.means), torch.as_tensor(layer.within) / seen.images
            known = Components.estimate(means, within, labels) if bool(means.isfinite().all()) else None
            alive = means.double().var(0, correction=0) + within > DEAD * float(site.module.eps)  # type: ignore[arg-type]
            rho, deff, bias = worth_of(known, alive, images, layer.positions, seen.counts)
        rows.append(
            LayerDiagnosis(
                names=site.names,
                kind=site.kind,
                channels=site.num_features,
                by_batch=site.names[0] in live,
                rho=rho,
                deff=deff,
                n_eff=None if deff is None else images / deff,
                running_var_bias=bias,
                leakage=leaks.get(site.names),
                values_per_channel=images * layer.positions if layer.positions else None,
                **figures,
            )
        )
    return tuple(rows)


def figures_of(site: BatchNormSite, layer: SeenLayer) -> dict[str, Any]:
    """Return the shift of a layer's data from its statistics, and its channels that are dead or not finite."""
    moments = layer.moments
    if moments is None:
        return {"shift_mean": None, "log_var_ratio": None, "log_var": None, "dead": 0, "not_finite": 0}
    mean, var, eps = moments.mean.double(), moments.var().double(), float(site.module.eps)  # type: ignore[arg-type]
    finite = mean.isfinite() & var.isfinite()
    counts = {"dead": int((finite & (var <= DEAD * eps)).sum()), "not_finite": int((~finite).sum())}
    shift = signed = size = None
    if why_no_statistics(site.module, preserve=False) is None and bool(finite.any()):
        source = statistics_of(site.module)
        stored = source.var.double().cpu() + eps
        ratio = ((var + eps) / stored).log()[finite]
        shift = float(((mean - source.mean.double().cpu()).abs() / stored.sqrt())[finite].mean())
        signed, size = float(ratio.mean()), float(ratio.abs().mean())
    return {"shift_mean": shift, "log_var_ratio": signed, "log_var": size, **counts}


def p_values_of(seen: Seen) -> tuple[float | None, float | None]:
    """Return how likely batches dealt at random would be as alike, by channel means and by labels."""
    numbers = torch.tensor(seen.numbers)
    chosen = _compared(numbers)
    sizes = Counter(numbers[chosen].tolist())
    if len(sizes) < 2 or max(sizes.values()) < 2:
        return None, None
    measured = [layer.means for layer in seen.layers if layer.means]
    columns = [torch.cat(means) for means in measured if sum(map(len, means)) == seen.images]
    p_value = label_p_value = None
    if columns:
        features = torch.cat([column[chosen] for column in columns], 1)
        features = features[:, features.isfinite().all(0)]
        if features.shape[1] > _FEATURES:
            order = torch.randperm(features.shape[1], generator=torch.Generator().manual_seed(0))
            features = features[:, order[:_FEATURES]]
        if features.shape[1]:
            p_value = batch_membership_p_value(features, numbers[chosen])
    if len(seen.labels) == seen.images and len(set(seen.labels)) > 1:
        of = torch.tensor(seen.labels)[chosen]
        different = torch.tensor(sorted(set(of.tolist())))
        label_p_value = batch_membership_p_value((of[:, None] == different).double(), numbers[chosen])
    return p_value, label_p_value


def _compared(numbers: Tensor) -> Tensor:
    """Return places of images of whole batches, spread over all batches, about `_COMPARED` of them."""
    batches = torch.tensor(sorted(set(numbers.tolist())))
    every = max(1, round(len(numbers) / _COMPARED))
    return torch.isin(numbers, batches[::every]).nonzero().flatten()


def batches_of(
    seen: Seen,
    rows: Sequence[LayerDiagnosis],
    size: int,
    p_values: tuple[float | None, float | None],
    gap: float | None,
    leakage: Leakage | None,
) -> BatchDiagnosis:
    """Return what the batches are like, on one device.

    Args:
        seen: the images and the batches that they came in.
        rows: the layers.
        size: images of a batch.
        p_values: what `p_values_of` returned.
        gap: between the outputs of the two modes.
        leakage: between the images of a batch.
    """
    known = [p for p in p_values if p is not None]
    deffs = [row.deff for row in rows if row.deff is not None]
    worth = [row.n_eff for row in rows if row.n_eff is not None]
    of_label: float | None = None
    if len(seen.labels) == seen.images:
        pairs = {(batch, label) for batch, label in zip(seen.numbers, seen.labels, strict=True)}
        of_label = seen.images / len(pairs)
    return BatchDiagnosis(
        batch_size=size,
        batches=len(seen.sizes),
        labels=len(set(seen.labels)) or None,
        images_per_label=of_label,
        p_value=p_values[0],
        label_p_value=p_values[1],
        iid=min(known) >= remedies.P_VALUE if known else None,
        deff=median(deffs) if deffs else None,
        n_eff=median(worth) if worth else None,
        train_eval_gap=gap,
        leakage=None if leakage is None else leakage.total,
        single_value_layers=tuple(
            row.name for row in rows if row.values_per_channel is not None and row.values_per_channel <= 1
        ),
    )
