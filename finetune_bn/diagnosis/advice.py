"""When what was seen of a batch matters, in a sentence; thresholds and remedies are those of `remedies.py`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from finetune_bn.diagnosis import remedies
from finetune_bn.diagnosis.inspector import LayerLook
from finetune_bn.diagnosis.leakage import Leakage

# Share of a layer's channels that died since training began.
DIED = 0.25


@dataclass(frozen=True)
class Look:
    """What one look at a training batch has found; None: cannot be told.

    Attributes:
        images: images of the batch.
        layers: what each BatchNorm layer sees of them.
        p_value: how likely batches drawn at random would differ as much as those of the last interval.
        p_value_so_far: the same of all intervals so far (Fisher's method).
        train_eval_gap: distance between outputs in training and eval mode, root mean square over images, relative to
            the distance between two images.
        leakage: how far an output moves when the other images of the batch are exchanged.
        labels: different labels seen so far.
        batches: batches whose labels were seen.
        single_value_batches: training batches so far that gave a layer one value a channel.
    """

    images: int
    layers: tuple[LayerLook, ...]
    p_value: float | None = None
    p_value_so_far: float | None = None
    train_eval_gap: float | None = None
    leakage: Leakage | None = None
    labels: int = 0
    batches: int = 0
    single_value_batches: int = 0

    def metrics(self, per_layer: bool = True) -> dict[str, float]:
        """Return the figures by name: `bn/...` averages over layers, `bn_layers/.../<layer>` those of each."""
        found: dict[str, float | None] = {}
        for figure in ("drift", "drift_z", "log_var_ratio", "rho", "deff", "n_eff", "running_var_bias"):
            by_layer = {layer.name: getattr(layer, figure) for layer in self.layers}
            known = [value for value in by_layer.values() if value is not None and math.isfinite(value)]
            if known:
                found[f"bn/{figure}"] = sum(known) / len(known)
            if per_layer:
                found |= {f"bn_layers/{figure}/{name or '(root)'}": value for name, value in by_layer.items()}
        if per_layer:
            found |= {f"bn_layers/dead/{layer.name or '(root)'}": float(layer.dead) for layer in self.layers}
        found["bn/not_finite"] = float(sum(layer.not_finite for layer in self.layers))
        found["bn/dead"] = float(sum(layer.dead for layer in self.layers))
        found["bn/died"] = float(sum(layer.died for layer in self.layers))
        found["bn/p_value"] = self.p_value
        found["bn/train_eval_gap"] = self.train_eval_gap
        found["bn/single_value_batches"] = float(self.single_value_batches)
        if self.leakage is not None:
            found["bn/leakage"] = self.leakage.total
            if per_layer:
                found |= {f"bn_layers/leakage/{row.names[0] or '(root)'}": row.leakage for row in self.leakage.rows}
        return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def fisher(p_values: Iterable[float]) -> float:
    """Return the p-value of independent tests together (Fisher 1925, section 21.1)."""
    logs = [math.log(p) for p in p_values]
    if not logs:
        return 1.0
    pair = torch.tensor([len(logs), -sum(logs)], dtype=torch.float64)
    return float(torch.special.gammaincc(pair[0], pair[1]))


def advise(look: Look, before: Look | None = None) -> Iterator[tuple[str, str]]:
    """Yield what matters about a look: a word for the cause, and a sentence or two with the remedy.

    Nothing is said of layers that do not normalize by the batch, save that their channels died.

    Args:
        look: the look.
        before: the look before, of the same training.
    """
    yield from _of_batches(look)
    yield from _of_modes(look, before)
    broken = [layer for layer in look.layers if layer.not_finite]
    if broken:
        yield (
            "not finite",
            f"NaN or infinite values reach {len(broken)} of {len(look.layers)} layers, as "
            f"{broken[0].name or '(root)'}: the training has diverged. "
            f"Take a smaller learning rate, or {remedies.LIMIT}.",
        )
    for layer in look.layers:
        if layer.died >= max(1.0, DIED * layer.channels):
            yield (
                "died",
                f"{layer.died} of {layer.channels} channels of {layer.name or 'the network'} have lost their variance "
                "since training began: the layer before returns a constant, and no gradient passes. The learning rate "
                f"is too high for it: {remedies.SMALLER_RATE}, or "
                f"{remedies.LIMIT}.",
            )
            break
    if look.single_value_batches:
        yield (
            "single value",
            f"{look.single_value_batches} batches had one value a channel in a layer, which has no variance and was "
            f"normalized by the running statistics. {remedies.DROP_LAST}",
        )


def _of_batches(look: Look) -> Iterator[tuple[str, str]]:
    live = [layer for layer in look.layers if layer.by_batch]
    if live and look.labels == 1 and look.batches > 1:
        yield (
            "one label",
            f"all images of the {look.batches} batches looked at have one label. If the data have others, the loader "
            "is sorted, and BatchNorm learns the statistics of one label after the other: shuffle it.",
        )
    worth = {layer: _worth(layer) for layer in live}
    low = [layer for layer in live if worth[layer] < remedies.N_EFF]
    if _many(low, live):
        worst = min(low, key=lambda layer: worth[layer])
        by_labels = worth[worst] < worst.images
        why = f", as images of one label resemble each other (DEFF {worst.deff:.1f})" if by_labels else ""
        remedy = remedies.BY_LABELS if by_labels else f"{remedies.INSTEAD} {remedies.LARGER}"
        yield (
            "n_eff",
            f"BatchNorm normalizes by statistics worth fewer than {remedies.N_EFF:.0f} independent images in "
            f"{len(low)} of {len(live)} layers: {worth[worst]:.1f} in {worst.name or 'the network'}, of "
            f"{worst.images} in the batch{why}. {remedy}",
        )
    if live and look.p_value_so_far is not None and look.p_value_so_far < remedies.P_VALUE:
        yield (
            "p_value",
            f"training batches are not i.i.d.: images of one batch are more alike than those of different batches "
            f"(p = {look.p_value_so_far:.1g}, permutation test). {remedies.SHUFFLE} {remedies.BY_LABELS}",
        )
    tracking = [layer for layer in look.layers if layer.tracks]
    off = [layer for layer in tracking if abs(layer.running_var_bias or 0.0) > remedies.RUNNING_VAR_BIAS]
    if _many(off, tracking):
        worst = max(off, key=lambda layer: abs(layer.running_var_bias or 0.0))
        yield (
            "running_var",
            f"running variances will settle more than {100 * remedies.RUNNING_VAR_BIAS:.0f} % off those of the data in "
            f"{len(off)} of {len(tracking)} layers ({100 * (worst.running_var_bias or 0.0):+.0f} % in "
            f"{worst.name or 'the network'}), as the images of a batch vary less about their own mean than "
            f"the data do. {remedies.RECALIBRATE}",
        )


def _of_modes(look: Look, before: Look | None) -> Iterator[tuple[str, str]]:
    gap, leakage = look.train_eval_gap, look.leakage
    lasting = before is not None and (before.train_eval_gap or 0.0) > remedies.TRAIN_EVAL_GAP
    if lasting and gap is not None and gap > remedies.TRAIN_EVAL_GAP:
        yield (
            "gap",
            f"the same images have other outputs in training than in eval mode, {100 * gap:.0f} % of the distance "
            "between two images apart: the network is evaluated as another than is trained. Evaluate by statistics of "
            "the data (add BatchNormRecalibration), or train by those of evaluation (policy Freeze or Renorm).",
        )
    if leakage is not None and leakage.total > remedies.LEAKAGE:
        yield (
            "leakage",
            f"images leak into each other: the output of an image moves by {100 * leakage.total:.0f} % of the "
            "distance between two images when the others of its batch are exchanged, so a loss can be lowered by "
            f"what the batch gives away. {remedies.INSTEAD}",
        )


def _worth(layer: LayerLook) -> float:
    """Return n_eff; the number of images where labels are not known, or what they make of it may be chance."""
    return layer.images if layer.n_eff is None or (layer.deff or 1.0) < remedies.DEFF else layer.n_eff


def _many(some: list[LayerLook], of: list[LayerLook]) -> bool:
    return bool(some) and len(some) >= remedies.SHARE_OF_LAYERS * len(of)
