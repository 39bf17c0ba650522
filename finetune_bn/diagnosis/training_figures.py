"""The figures of one fine-tuning: all panels on a slide, or one panel a figure for a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from finetune_bn.diagnosis.figures import History, confusion_matrix, curve_names, domain_bars, learning_curves
from finetune_bn.utilities.rendering import FONT, INK, fonts, new_figure, svg


@dataclass(frozen=True)
class Drawn:
    """What there is to draw.

    Attributes:
        history: the metrics of each epoch.
        accuracies: of each domain that was tested, 0 to 1.
        overall: over all domains.
        confusion: counts [C, C], rows are the true classes.
        class_names: C names.
    """

    history: History = ()
    accuracies: Mapping[str, float] | None = None
    overall: float | None = None
    confusion: Tensor | None = None
    class_names: Sequence[str] = ()

    @property
    def curves(self) -> list[str]:
        """Words in the names of the metrics that are curves."""
        return [word for word in ("loss", "acc") if curve_names(self.history, word)]


def slide(title: str, subtitle: str, drawn: Drawn) -> Any:
    """Return a `matplotlib.figure.Figure` with those panels for which there is something to draw."""
    with fonts():
        curves = drawn.curves
        columns = max(1, len(curves))
        rows = ([curves] if curves else []) + ([["domains"] * columns] if drawn.accuracies else [])
        figure, left, right = _titled(title, subtitle, drawn, len(rows), columns)
        if rows:
            axes = left.subplot_mosaic(rows, height_ratios=[3, 2] if len(rows) == 2 else None)
            for word in curves:
                learning_curves(axes[word], drawn.history, word)
            if drawn.accuracies:
                domain_bars(axes["domains"], drawn.accuracies, drawn.overall)
        if drawn.confusion is not None:
            confusion_matrix(right.subplots(), drawn.confusion, drawn.class_names)
        if not rows and drawn.confusion is None:
            left.text(0.5, 0.5, "No loss and no accuracy was logged.", ha="center", fontsize=FONT)
        return figure


def panels(drawn: Drawn) -> Iterator[tuple[str, str, float, bool]]:
    """Yield what a page has no plot of its own for, the confusion matrix; as `page.html_figures` takes it."""
    if drawn.confusion is not None:
        counts, side = drawn.confusion, 4.2 + 0.28 * min(60, len(drawn.class_names))
        picture = _panel("confusion", lambda axes: confusion_matrix(axes, counts, drawn.class_names), side + 1, side)
        yield picture, "confusion matrix; the worst classes are in the table of classes", side + 1, True


def _panel(name: str, draw: Callable[[Any], None], width: float, height: float) -> str:
    with fonts():
        figure = new_figure(width, height)
        draw(figure.subplots())
        return svg(figure, name)


def _titled(title: str, subtitle: str, drawn: Drawn, rows: int, columns: int) -> tuple[Any, Any, Any]:
    """Return a figure with its title, its part for small panels, and its part for the confusion matrix."""
    head, height, width = 0.8, (2.2, 3.8, 7.3)[rows], max(7.0, 4.6 * columns)
    matrix = 0.0
    if drawn.confusion is not None:
        # More classes get more room, which on a slide makes all letters smaller.
        height = 7.3 * (1 + min(0.4, max(0, len(drawn.class_names) - 12) / 40))
        matrix = height + 1.1
        width = max(3.4 * columns, 4.6) * height / 7.3 if rows else 0.0
    figure = new_figure(width + matrix, head + height)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    top, body = figure.subfigures(2, 1, height_ratios=[head, height])
    place = {"x": 0.15 / (width + matrix), "ha": "left", "va": "top", "parse_math": False}
    top.text(y=0.8, s=title, fontsize=1.5 * FONT, fontweight="bold", color=INK, **place)
    top.text(y=0.35, s=subtitle, fontsize=FONT, color="#555555", **place)
    if width and matrix:
        return figure, *body.subfigures(1, 2, width_ratios=[width, matrix])
    return figure, body, body
