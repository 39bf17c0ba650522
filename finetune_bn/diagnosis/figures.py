"""Figures about experiments: panels that draw on given axes.

No panel touches `pyplot`, a display or the style the user has set: figures are made by `new_figure` and rendered by
`png` or `svg` of `finetune_bn.utilities.rendering`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.rendering import BLUE, FAINT, FONT, GREEN, INK, ORANGE, PURPLE, VERMILION

History = Sequence[Mapping[str, float | None]]
"""One mapping of metric names to values per epoch, the epoch itself under `epoch`, from 0; None where not finite."""

_ON_LIGHT = "#222221"  # ink on a cell, which is light on a dark page too
NUMBERS_UP_TO = 30  # classes; the cells of a larger confusion matrix have no room for a number
LABELS_UP_TO = 45  # names that fit along one side of a confusion matrix
_LINES = ((BLUE, "o", "--"), (VERMILION, "s", "-"), (GREEN, "^", "-."), (PURPLE, "D", ":"), (ORANGE, "v", "-"))


def curve_names(history: History, word: str) -> list[str]:
    """Return the metrics with `word` in their name, in order of appearance.

    A part (`val_accuracy/noto`) is left out where the whole (`val_accuracy`) is there as well.
    """
    names = list(dict.fromkeys(name for record in history for name in record))
    return [name for name in names if word in name.lower() and name.rpartition("/")[0] not in names]


def learning_curves(axes: Any, history: History, word: str = "loss") -> None:
    """Draw the metrics that have `word` in their name over the epochs trained; the legend gives the best of each.

    With `word="acc"` more is better, and shares (values up to 1) are shown in percent.

    Args:
        axes: matplotlib axes to draw on.
        history: one mapping per epoch.
        word: part of the names, in lower case, as `loss` or `acc`.

    Raises:
        FinetuneBNError: no metric has such a name.
    """
    from matplotlib.ticker import MaxNLocator

    names = curve_names(history, word)
    if not names:
        known = ", ".join(sorted({name for record in history for name in record})) or "no name: nothing was logged"
        raise FinetuneBNError(complaint("word", word, f"a part of one of {known}"))
    curves = {name: _curve(history, name) for name in names}
    best_of, called = (max, "best") if word == "acc" else (min, "lowest")
    finite = {name: [y for _, y in curve if math.isfinite(y)] for name, curve in curves.items()}
    percent = word == "acc" and all(0 <= y <= 1 for ys in finite.values() for y in ys)
    for (name, curve), (color, marker, line) in zip(curves.items(), _lines(names), strict=True):
        best = best_of(finite[name], default=math.nan)
        label = f"{name} ({called} {_percent(best) if percent else format(best, '.3g')})"
        x, y = [x for x, _ in curve], [100 * y if percent else y for _, y in curve]
        size = 5 if len(curve) <= 30 else 0
        axes.plot(x, y, color=color, marker=marker, markersize=size, linestyle=line, linewidth=1.8, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.margins(x=0.04, y=0.12)
    epochs = {x for curve in curves.values() for x, _ in curve}
    if len(epochs) == 1:  # a single point leaves matplotlib an axis of fractions
        (epoch,) = epochs
        axes.set_xlim(epoch - 1, epoch + 1)
        axes.set_xticks([epoch], [f"{epoch:.0f}"])
    quantity = "accuracy" if word == "acc" else word
    _tidy(axes, quantity.capitalize(), "epochs trained", quantity + (" (%)" if percent else ""), len(curves))
    # Between title and axes, where no curve can pass.
    place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1), "borderaxespad": 0}
    axes.legend(**place, frameon=False, fontsize=0.85 * FONT, labelcolor=INK)


def confusion_matrix(axes: Any, counts: Tensor, class_names: Sequence[str]) -> None:
    """Draw for what the images of each class were taken: the color is the share of the row, the number the count.

    Beyond `NUMBERS_UP_TO` classes there are no numbers, beyond `LABELS_UP_TO` as many names as fit.

    Args:
        axes: matplotlib axes to draw on.
        counts: whole numbers [C, C]; rows are the true classes, columns the predicted ones.
        class_names: C names.

    Raises:
        FinetuneBNError: the sizes do not belong together.
    """
    classes = len(class_names)
    if counts.shape != (classes, classes) or not classes:
        allowed = f"a square table with a row for each of the {classes} classes"
        raise FinetuneBNError(complaint("counts", tuple(counts.shape), allowed))
    counts = counts.detach().cpu().round().long()
    images = counts.sum(1)
    share = counts / images.clamp_min(1)[:, None]
    picture = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    side = 0.8 * min(axes.bbox.width, axes.bbox.height) / axes.figure.dpi * 72 / classes  # points; labels take the rest
    if classes <= NUMBERS_UP_TO:
        digits = max(2, len(str(int(counts.max()))))
        size = min(FONT, 0.9 * side / digits, 0.6 * side)
        for true, predicted in counts.nonzero().tolist():
            color = "white" if share[true, predicted] > 0.55 else _ON_LIGHT
            number = str(int(counts[true, predicted]))
            axes.text(predicted, true, number, ha="center", va="center", fontsize=size, color=color)
    every = math.ceil(classes / LABELS_UP_TO)
    ticks = list(range(0, classes, every))
    names = [shortened(class_names[i]) for i in ticks]
    rows = [f"{name} ({int(images[i])})" for name, i in zip(names, ticks, strict=True)]
    size = max(5.0, min(0.9 * FONT, 0.8 * side * every))
    title = "Confusion matrix" + (f" (one class in {every} is named)" if every > 1 else "")
    _tidy(axes, title, "predicted class", "true class (number of its images)")
    axes.grid(False)
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=size, parse_math=False)
    axes.set_yticks(ticks, rows, fontsize=size, parse_math=False)
    axes.tick_params(length=2 if every == 1 else 4)
    for spine in axes.spines.values():
        spine.set(visible=True, color=FAINT)
    bar = axes.figure.colorbar(picture, ax=axes, shrink=0.5, aspect=30, pad=0.02, format=lambda x, _: f"{100 * x:.0f}")
    bar.set_label("% of the true class", fontsize=0.85 * FONT, color=INK)
    bar.ax.tick_params(labelsize=0.8 * FONT, colors=INK, length=2)
    bar.outline.set_visible(False)


def domain_bars(axes: Any, accuracies: Mapping[str, float], overall: float | None = None) -> None:
    """Draw one bar per domain, with its accuracy in percent beside it, and a line at the accuracy over all images.

    Args:
        axes: matplotlib axes to draw on.
        accuracies: share of right answers, 0 to 1, by domain; drawn from top to bottom in this order.
        overall: share of right answers over all domains.

    Raises:
        FinetuneBNError: there is no domain, or a share is outside 0 to 1.
    """
    shares = [*accuracies.values(), *([] if overall is None else [overall])]
    if not accuracies or not all(0 <= share <= 1 for share in shares):
        raise FinetuneBNError(complaint("accuracies", dict(accuracies), "one share from 0 to 1, or more"))
    places = range(len(accuracies))
    axes.barh(places, [100 * share for share in accuracies.values()], height=0.62, color=BLUE)
    size = min(FONT, 150 / len(accuracies))
    for place, share in zip(places, accuracies.values(), strict=True):
        inside = share > 0.25
        align = {"ha": "right" if inside else "left", "va": "center", "color": "white" if inside else INK}
        shift = (-6 if inside else 6, 0)
        axes.annotate(_percent(share), (100 * share, place), shift, textcoords="offset points", fontsize=size, **align)
    title = "Test accuracy"
    if overall is not None:
        axes.axvline(100 * overall, color=VERMILION, linestyle="--", linewidth=1.5, zorder=0)
        title += f" (dashed: all images, {_percent(overall)})"
    _tidy(axes, title, "accuracy (%)", "")
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 20))
    axes.set_yticks(places, [shortened(name) for name in accuracies], fontsize=size, parse_math=False)
    axes.set_ylim(len(accuracies) - 0.4, -0.6)


def shortened(name: str, length: int = 22) -> str:
    """Return a name that fits at an axis, with an ellipsis where it was cut."""
    return name if len(name) <= length else name[: length - 1].rstrip() + "…"


def _curve(history: History, name: str) -> list[tuple[float, float]]:
    """Return (epochs trained, value); NaN, a gap in the line, where the value was not finite."""
    points = [(record.get("epoch"), record[name]) for record in history if name in record]
    return [(epoch + 1, math.nan if value is None else value) for epoch, value in points if epoch is not None]


def _lines(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return color, marker and line style for each name; training and validation have theirs in every panel."""
    stages = [next((name for name in names if stage in name.lower()), "") for stage in ("train", "val")]
    of_stage = dict(zip(stages, _LINES, strict=False))
    others = itertools.cycle(_LINES[2:])
    return [of_stage.get(name) or next(others) for name in names]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _tidy(axes: Any, title: str, xlabel: str, ylabel: str, lines_below: int = 0) -> None:
    """Set title and labels in the common style, with room for a legend of so many lines below the title."""
    axes.set_title(
        title, loc="left", fontsize=1.1 * FONT, color=INK, fontweight="bold", pad=6 + 1.4 * FONT * lines_below
    )
    axes.set_xlabel(xlabel, fontsize=FONT, color=INK)
    axes.set_ylabel(ylabel, fontsize=FONT, color=INK)
    axes.tick_params(labelsize=0.9 * FONT, colors=INK, length=0)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=FAINT)
