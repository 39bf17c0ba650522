"""Figures with a bar for each layer of a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_bn.diagnosis.figures import BLUE, GREEN, ORANGE, PURPLE, VERMILION
from finetune_bn.diagnosis.rendering import FAINT, FONT, INK, new_figure

_NAMED = 12  # layers whose names fit below the axis


def layer_bars(names: Sequence[str], panels: Mapping[str, Sequence[float | None]]) -> Any:
    """Return a matplotlib figure with one panel below the other, a bar for each layer; None leaves its place empty.

    Args:
        names: of the layers.
        panels: what each panel shows, and a value a layer.
    """
    figure = new_figure(9.0, 1.2 + 2.2 * len(panels))
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, values), color in zip(
        rows, panels.items(), (BLUE, VERMILION, GREEN, PURPLE, ORANGE), strict=False
    ):
        axes.bar(range(len(names)), [math.nan if value is None else value for value in values], color=color)
        axes.set_ylabel(label, fontsize=0.85 * FONT, color=INK)
        axes.tick_params(labelsize=0.75 * FONT, colors=INK, length=0)
        axes.grid(axis="y", color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set(visible=side in ("left", "bottom"), color=FAINT)
    every = max(1, math.ceil(len(names) / _NAMED))
    ticks = list(range(0, len(names), every))
    rows[-1].set_xticks(ticks, [names[i] for i in ticks], rotation=45, ha="right", parse_math=False)
    return figure
