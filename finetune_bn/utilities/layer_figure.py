"""A figure with one place a layer, as the results of this package have it in `plot()`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_bn.utilities.rendering import (
    BLUE,
    FAINT,
    FONT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    VERMILION,
    fonts,
    new_figure,
)

COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE)
NAMES_UP_TO = 60  # layers; of more, every second, third ... is named

Panels = Mapping[str, Mapping[str, Sequence[float | None]]]
"""By the name of the axis, with its unit: one or more series of a number a layer, by what the legend calls them."""


def layer_figure(
    title: str,
    names: Sequence[str],
    panels: Panels,
    *,
    errors: Sequence[float | None] | None = None,
    stacked: bool = False,
) -> Any:
    """Return a `matplotlib.figure.Figure` with a bar for each layer, in the order given.

    Args:
        title: one line.
        names: one a layer; "" is the root.
        panels: what is drawn, one panel below the other; None and what is not finite is left out.
        errors: standard errors of the first series.
        stacked: whether the series stand on one another, and not beside each other: a layer is in one of them.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    figure = new_figure(min(16.0, max(6.0, 1.5 + 0.22 * len(names))), 2.0 + 2.6 * len(panels))
    with fonts():
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (ylabel, values) in zip(rows, panels.items(), strict=True):
            bar = 0.8 if stacked else 0.8 / max(len(values), 1)
            for i, (label, series) in enumerate(values.items()):
                places = [n - 0.4 + bar * (0.5 if stacked else i + 0.5) for n in range(len(names))]
                heights = [_known(value) for value in series]
                axes.bar(places, heights, bar, color=COLORS[i % len(COLORS)], label=label)
                if errors is not None and axes is rows[0] and i == 0:
                    spread = [_known(value) for value in errors]
                    axes.errorbar(places, heights, spread, fmt="none", ecolor=INK, elinewidth=1)
            axes.set_ylabel(ylabel, fontsize=0.9 * FONT, color=INK, parse_math=False)
            axes.tick_params(labelcolor=INK, length=0)
            axes.grid(axis="y", color=FAINT, linewidth=0.7)
            axes.set_axisbelow(True)
            for side, spine in axes.spines.items():
                spine.set(visible=side in ("left", "bottom"), color=FAINT)
            if len(values) > 1:
                axes.legend(frameon=False, fontsize=0.85 * FONT, labelcolor=INK)
        every = max(1, math.ceil(len(names) / NAMES_UP_TO))
        ticks = list(range(0, len(names), every))
        shown = [names[i] or "(root)" for i in ticks]
        rows[-1].set_xticks(ticks, shown, rotation=90, fontsize=0.75 * FONT, parse_math=False)
        rows[-1].set_xlim(-0.6, max(len(names), 1) - 0.4)
        rows[0].set_title(title, loc="left", fontsize=1.1 * FONT, color=INK, fontweight="bold", parse_math=False)
    return figure


def _known(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else float(value)
