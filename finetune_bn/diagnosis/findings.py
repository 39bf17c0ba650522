"""What was measured, judged: one finding for each thing that was looked at, in words and with the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from finetune_bn.diagnosis import remedies
from finetune_bn.diagnosis.normalization import Normalization
from finetune_bn.diagnosis.results import LEVELS, BatchDiagnosis, Curvature, Finding, LayerDiagnosis, Level


@dataclass(frozen=True)
class Facts:
    """All that findings are made of.

    Attributes:
        layers: the layers.
        batches: the batches.
        images: images measured.
        bad: images left out as they hold NaN or infinite values: (number of the batch, place in it).
        one_label: whether all images seen have one label.
        live: names of the layers that normalize by the batch in the training that is planned.
        policy: the planned policy in words; None: the model as it is.
        inputs: how the images were normalized.
        curvature: of the loss.
        steps: optimizer steps of the training; None where that is not known.
        ema: decay of averaged weights and the step from which they are averaged; None without.
        unknown: layers that are BatchNorm's kin and are not looked at, with the reason.
        notes: findings from outside, such as what is said of the device.
    """

    layers: Sequence[LayerDiagnosis]
    batches: BatchDiagnosis
    images: int
    bad: Sequence[tuple[int, int]]
    one_label: bool
    live: frozenset[str]
    policy: str | None
    inputs: Normalization | None
    curvature: Curvature | None
    steps: int | None
    ema: tuple[float, int] | None
    unknown: Sequence[tuple[str, str]] = ()
    notes: Sequence[Finding] = ()


def findings_of(facts: Facts) -> tuple[Finding, ...]:
    """Return the findings, the worst first."""
    found = [
        *facts.notes,
        *_of_images(facts),
        *_of_layers(facts),
        *_of_batches(facts),
        *_of_modes(facts),
        *_of_training(facts),
    ]
    return tuple(sorted(found, key=lambda finding: -LEVELS.index(finding.level)))


def _of_images(facts: Facts) -> Iterator[Finding]:
    if facts.bad:
        batch, place = facts.bad[0]
        yield Finding(
            "not finite",
            "problem",
            f"{len(facts.bad)} of {len(facts.bad) + facts.images} images hold NaN or infinite values, the first one "
            f"image {place} of batch {batch}; they were left out here, and a training would not do so.",
            float(len(facts.bad)),
            "Look at what loads and normalizes them.",
        )
    if facts.one_label:
        yield Finding(
            "one label",
            "problem",
            f"all {facts.images} images looked at have one label: there is one class, or the loader is sorted.",
            1.0,
            "If the data have other classes, shuffle the loader; a single class is nothing to learn from.",
        )
    inputs = facts.inputs
    if inputs is None or inputs.done is None or inputs.wanted is None:
        return
    if inputs.fits:
        yield Finding("normalization", "ok", f"images are normalized as the weights want them: {inputs.done}.")
        return
    shifts = ""
    if inputs.shift is not None and inputs.shift_if_right is not None:
        shifts = f" The first layer is {inputs.shift:.2f} sd off, and would be {inputs.shift_if_right:.2f}."
    yield Finding(
        "normalization",
        "problem",
        f"the range of the pixels fits {inputs.done}, and the weights want {inputs.wanted}.{shifts}",
        inputs.shift,
        "Normalize the images as the weights want them, before anything else is changed.",
    )


def _of_layers(facts: Facts) -> Iterator[Finding]:
    if not facts.layers:
        kin = "".join(f" {name or '(root)'} {why}." for name, why in facts.unknown[:3])
        yield Finding(
            "no BatchNorm",
            "note",
            f"the model has no BatchNorm layer, live or frozen: there is nothing to treat.{kin}",
            0.0,
        )
        return
    broken = [layer for layer in facts.layers if layer.not_finite]
    if broken:
        yield Finding(
            "not finite inside",
            "problem",
            f"NaN or infinite values reach {len(broken)} of {len(facts.layers)} layers, as {broken[0].name}, though "
            "the images are finite: weights or statistics are damaged.",
            float(len(broken)),
            "Load the weights again.",
        )
    silent = [layer for layer in facts.layers if layer.shift_mean is None and not layer.not_finite]
    if silent:
        yield Finding(
            "not measured",
            "note",
            f"{len(silent)} of {len(facts.layers)} layers did not run or keep no statistics, as {silent[0].name}: "
            "nothing is said of them.",
            float(len(silent)),
        )
    known = [layer.shift_mean for layer in facts.layers if layer.shift_mean is not None]
    if known:
        shift = median(known)
        worst = max((r for r in facts.layers if r.shift_mean is not None), key=lambda r: r.shift_mean or 0.0)
        level: Level = "note" if shift > remedies.SHIFT else "ok"
        yield Finding(
            "shift",
            level,
            f"the data are {shift:.2f} standard deviations off the stored means (median of {len(known)} layers, "
            f"{worst.shift_mean or 0.0:.2f} in {worst.name}).",
            shift,
        )


def _of_batches(facts: Facts) -> Iterator[Finding]:
    batches, live = facts.batches, [layer for layer in facts.layers if layer.names[0] in facts.live]
    matters: Level = "warning" if live else "note"
    alone = "" if live else " The planned layers do not normalize by the batch: no matter to them."
    p_values = [p for p in (batches.p_value, batches.label_p_value) if p is not None]
    if p_values and batches.iid is not None:
        by = "their images" if batches.p_value == min(p_values) else "their labels"
        if batches.iid:
            yield Finding(
                "i.i.d.", "ok", f"batches look like independent draws (p = {min(p_values):.2g}).", min(p_values)
            )
        else:
            deff = "" if batches.deff is None else f", DEFF {batches.deff:.2f}"
            yield Finding(
                "i.i.d.",
                matters,
                f"batches are not i.i.d.: images of one batch are more alike than those of different batches, by {by} "
                f"(p = {min(p_values):.1g}, permutation test{deff}).{alone}",
                min(p_values),
                f"{remedies.SHUFFLE} {remedies.BY_LABELS}" if live else "",
            )
    worth = {layer: _worth(facts, layer) for layer in live}
    low = [layer for layer in live if worth[layer] < remedies.N_EFF]
    if low and len(low) >= remedies.SHARE_OF_LAYERS * len(live):
        least = min(low, key=lambda layer: worth[layer])
        by_labels = worth[least] < _images(facts)
        why = f", as images of one label resemble each other (DEFF {least.deff:.1f})" if by_labels else ""
        yield Finding(
            "independent images",
            "warning",
            f"live BatchNorm would normalize by statistics worth fewer than {remedies.N_EFF:.0f} independent images in "
            f"{len(low)} of {len(live)} layers: {worth[least]:.1f} in {least.name}, of {_images(facts)} in the "
            f"batch{why}.",
            worth[least],
            remedies.BY_LABELS if by_labels else f"{remedies.INSTEAD} {remedies.LARGER}",
        )
    off = [layer for layer in live if abs(layer.running_var_bias or 0.0) > remedies.RUNNING_VAR_BIAS]
    if off and len(off) >= remedies.SHARE_OF_LAYERS * len(live):
        far = max(off, key=lambda layer: abs(layer.running_var_bias or 0.0))
        yield Finding(
            "running variance",
            "warning",
            f"running variances would settle more than {100 * remedies.RUNNING_VAR_BIAS:.0f} % off those of the data "
            f"in {len(off)} of {len(live)} layers ({100 * (far.running_var_bias or 0.0):+.0f} % in {far.name}).",
            far.running_var_bias,
            remedies.RECALIBRATE,
        )
    single = [name for name in batches.single_value_layers if name in {layer.name for layer in live}]
    if single:
        yield Finding(
            "single value",
            "problem",
            f"{len(single)} layers would get one value a channel in training, as {single[0]}: that has no variance, "
            "and torch refuses it.",
            float(len(single)),
            remedies.DROP_LAST + f" Or: {remedies.FREEZE}.",
        )


def _of_modes(facts: Facts) -> Iterator[Finding]:
    gap, leakage, live = facts.batches.train_eval_gap, facts.batches.leakage, bool(facts.live)
    if gap is not None and gap > 0:
        wide = gap > remedies.TRAIN_EVAL_GAP
        yield Finding(
            "train/eval gap",
            "note" if wide and live else "ok",
            f"before training the outputs of live layers are {100 * gap:.0f} % of the distance between two images "
            "apart in the two modes.",
            gap,
            remedies.ONE_MODE if wide and live else "",
        )
    if leakage is not None:
        much = leakage > remedies.LEAKAGE
        yield Finding(
            "leakage",
            "warning" if much and live else "ok",
            f"the output of an image moves by {100 * leakage:.0f} % of the distance between two images when the others "
            "of its batch are exchanged, in live layers."
            if leakage
            else "no output depends on the other images of its batch.",
            leakage,
            f"A loss can be lowered by what the batch gives away. {remedies.FREEZE}." if much and live else "",
        )


def _of_training(facts: Facts) -> Iterator[Finding]:
    batches, live = facts.batches, bool(facts.live)
    few = batches.batch_size < remedies.N_EFF
    if batches.accumulate > 1:
        yield Finding(
            "gradient accumulation",
            "warning" if live and few else "note" if live else "ok",
            f"gradients of {batches.accumulate} batches make a step, {batches.accumulate * batches.batch_size} images; "
            f"live BatchNorm still normalizes by the {batches.batch_size} of one.",
            float(batches.accumulate),
            f"{remedies.FREEZE}; frozen layers make accumulation exact." if live and few else "",
        )
    if batches.devices > 1:
        alone = live and not facts.batches.synced
        yield Finding(
            "devices",
            "warning" if alone and few else "note" if alone else "ok",
            f"{batches.devices} devices take {batches.batch_size} images each, and live BatchNorm "
            f"{'normalizes all of them together' if batches.synced else 'does not look across them'}.",
            float(batches.devices),
            remedies.SYNC if alone and few else "",
        )
    yield from _of_ema(facts)
    yield from _of_rate(facts)


def _of_ema(facts: Facts) -> Iterator[Finding]:
    if facts.ema is None or facts.steps is None:
        return
    (decay, start), steps = facts.ema, facts.steps
    if start >= steps:
        yield Finding(
            "averaged weights",
            "problem",
            f"averaging begins at step {start}, and the training has {steps}: what is evaluated would be the weights "
            "from before the training.",
            float(start),
            "Let it begin earlier, or train longer.",
        )
        return
    left = decay ** (steps - start)
    yield Finding(
        "averaged weights",
        "warning" if left > 0.1 else "ok",
        f"in {steps - start} steps with decay {decay:g} the weights of the beginning keep a share of {left:.2g} in the "
        "average.",
        left,
        f"Take a decay of {max(0.0, 1 - 5 / (steps - start)):.3g} or less." if left > 0.1 else "",
    )


def _of_rate(facts: Facts) -> Iterator[Finding]:
    found = facts.curvature
    if found is None or found.live is None or found.frozen is None:
        return
    sizes = f"the loss is curved by {found.live:.3g} with live layers and {found.frozen:.3g} with frozen ones"
    bound = found.lr_bound_live if facts.live else found.lr_bound_frozen
    if found.lr is None or bound is None:
        yield Finding("curvature", "ok", f"{sizes} (largest eigenvalue of the Hessian).", found.ratio)
        return
    high = found.lr > bound
    which = "live" if facts.live else "frozen"
    proposed = f"Take {found.proposed:.2g}, or {remedies.LIMIT}." if high and found.proposed is not None else ""
    yield Finding(
        "learning rate",
        "warning" if high else "ok",
        f"{sizes}; with {which} layers steps of {found.optimizer} grow in the steepest direction from a rate of "
        f"{bound:.2g} on, and yours is {found.lr:.2g}.",
        bound,
        proposed,
    )


def _worth(facts: Facts, layer: LayerDiagnosis) -> float:
    """Return n_eff; the number of images where labels are not known, or what they make of it may be chance."""
    told = layer.n_eff is not None and (layer.deff or 1.0) >= remedies.DEFF
    return layer.n_eff if told and layer.n_eff is not None else float(_images(facts))


def _images(facts: Facts) -> int:
    """Return how many images a layer normalizes together."""
    return facts.batches.batch_size * (facts.batches.devices if facts.batches.synced else 1)
