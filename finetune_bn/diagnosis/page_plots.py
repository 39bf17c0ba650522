"""Plots of a page, made as SVG by hand: bars of layers, and curves, of which the page's script says what they are.

Lengths along x are shares of the width and lengths along y are pixels, so that letters have one size on a phone and on
a screen.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_bn.diagnosis.page import html_table

TOP, HEIGHT = 8.0, 168.0  # pixels: where the plot begins, and how high it is
KINDS = 7  # colors with dashes, after which they begin again
DOTS_UP_TO = 60  # points of a curve that are seen as dots
_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
HINT = "Point at it, tap it, or use the arrow keys."


@dataclass(frozen=True)
class Bars:
    """One number a layer.

    Attributes:
        title: what it is, with its unit.
        values: one a layer; None and what is not finite has no bar.
        line: where a line lies, as a bound.
        line_label: what it is.
        log: whether the axis is logarithmic; bars of numbers that are not above 0 are then left out.
        percent: whether the axis is in percent.
        digits: form of the number that is said, as of `format`.
    """

    title: str
    values: Sequence[float | None]
    line: float | None = None
    line_label: str = ""
    log: bool = False
    percent: bool = False
    digits: str = ".3g"


@dataclass(frozen=True)
class Curve:
    """A line through points.

    Attributes:
        label: for the legend, plain text; curves of one label are drawn in one color and named once.
        points: pairs (x, y), in order; None and what is not finite is a gap.
        faint: whether it is of less weight.
        about: what is said of it beside its label.
    """

    label: str
    points: Sequence[tuple[float, float | None]]
    faint: bool = False
    about: str = ""


def html_layers(
    names: Sequence[str],
    panels: Sequence[Bars],
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    texts: Sequence[int] = (0,),
) -> str:
    """Return plots of layers and the table of the same layers: pointing at one shows it in all, and sorting sorts all.

    Args:
        names: one a layer.
        panels: what is drawn; a panel without a number is left out.
        header: of the table.
        rows: of the table, one a layer.
        texts: numbers of the columns that hold texts.
    """
    drawn = [_bars(names, panel) for panel in panels if any(_is_known(v, panel.log) for v in panel.values)]
    table = html_table(header, rows, texts)
    if not table:
        return ""
    figures = f'<div class="figures">{"".join(drawn)}</div>' if drawn else ""
    return f'<div class="linked">{figures}{table}</div>'


def html_curves(
    title: str,
    curves: Sequence[Curve],
    xlabel: str,
    *,
    percent: bool = False,
    log: bool = False,
    xlog: bool = False,
    table: str = "",
) -> str:
    """Return curves with their legend. "" without a point.

    Args:
        title: what is drawn, with its unit.
        curves: those of one label are of one color.
        xlabel: what x is; "epoch" gives "epoch 3".
        percent: whether y is a share, 0 to 1, to be shown in percent.
        log: whether y is drawn on a logarithmic axis, where all of it is above 0.
        xlog: whether x, all of it above 0, is.
        table: words that say where the same numbers are in a table, for those who do not see the plot.
    """
    known = [(x, y) for curve in curves for x, y in curve.points if y is not None and _is_known(y)]
    if not known:
        return ""
    xs, ys = [x for x, _ in known], [y for _, y in known]
    log = log and min(ys) > 0
    axis = _Axis.over(ys, log, zero=False)
    scale = _Scale.over(xs, xlog)
    labels = list(dict.fromkeys(curve.label for curve in curves))
    shapes, dots = [], []
    for curve in curves:
        kind = labels.index(curve.label)
        few = " few" if len(curve.points) <= DOTS_UP_TO and not curve.faint else ""
        places: list[tuple[float, float]] = []
        for x, y in [*curve.points, (0.0, None)]:
            if y is None or not _is_known(y, log):
                if len(places) > 1:
                    line = " ".join(f"{px:.2f},{py:.2f}" for px, py in places)
                    faint = " faint" if curve.faint else ""
                    shapes.append(f'<polyline class="k{kind % KINDS}{faint}" data-curve="{kind}" points="{line}"/>')
                places = []
                continue
            place = scale.x(x)
            places.append((place, axis.y(y) - TOP))
            value = f"{100 * y:.1f} %" if percent else f"{y:.4g}"
            about = f", {curve.about}" if curve.about else ""
            said = html.escape(f"{curve.label}{about}, {xlabel} {x:g}: {value}")
            dots.append(
                f'<circle class="k{kind % KINDS}{few}" data-curve="{kind}" data-mark cx="{place:.2f}%" '
                f'cy="{axis.y(y):.1f}"><title>{said}</title></circle>'
            )
    # Only in a picture that is stretched are the corners of a line shares of the width.
    stretched = (
        f'<svg x="0" y="{TOP:g}" width="100%" height="{HEIGHT:g}" viewBox="0 0 100 {HEIGHT:g}" '
        f'preserveAspectRatio="none" overflow="visible">{"".join(shapes)}</svg>'
    )
    legend = "".join(
        f'<li data-curve="{i}"><svg aria-hidden="true"><line class="k{i % KINDS}" x1="0" y1="5" x2="34" y2="5"/></svg>'
        f"{html.escape(label)}</li>"
        for i, label in enumerate(labels)
    )
    ends = "".join(
        f'<text x="{scale.x(tick):.2f}%" y="{TOP + HEIGHT + 18:g}" text-anchor="middle">{tick:g}</text>'
        for tick in scale.ticks()
    )
    ends += f'<text x="100%" y="{TOP + HEIGHT + 34:g}" text-anchor="end">{html.escape(xlabel)}</text>'
    described = f"{title}: {', '.join(labels)}{f'; {table}' if table else ''}"
    inside = axis.grid(percent) + ends + stretched + "".join(dots)
    return _chart("curves", title, described, inside, f'<ul class="legend">{legend}</ul>')


def _bars(names: Sequence[str], panel: Bars) -> str:
    known = [value for value in panel.values if value is not None and _is_known(value, panel.log)]
    line = panel.line if panel.line is not None and _is_known(panel.line, panel.log) else None
    axis = _Axis.over([*known, *([] if line is None else [line])], panel.log, zero=True)
    width = 100 / len(names)
    parts = []
    for i, (name, value) in enumerate(zip(names, panel.values, strict=True)):
        if value is not None and _is_known(value, panel.log):
            top, bottom = sorted((axis.y(value), axis.y(axis.low if panel.log else 0.0)))
            said, height = format(value, panel.digits), max(bottom - top, 1.0)
        else:
            said, top, height = "not known" if value is None else f"{value:g}", TOP + HEIGHT, 0.0
        text = html.escape(f"{name or '(root)'}: {said}")
        parts.append(
            f'<rect data-mark x="{width * i:.3f}%" y="{top:.1f}" width="{0.8 * width:.3f}%" height="{height:.1f}">'
            f"<title>{text}</title></rect>"
        )
    if line is not None:
        y = axis.y(line)
        label = html.escape(panel.line_label)
        parts.append(f'<line class="mark" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="100%" y="{y - 5:.1f}" text-anchor="end">{label}</text>')
    below = f'<text x="0" y="{TOP + HEIGHT + 18:g}">{len(names)} layers, in the order of the table</text>'
    described = f"{panel.title}, one bar a layer; the numbers are in the table below"
    return _chart("bars", panel.title, described, axis.grid(panel.percent) + "".join(parts) + below, "")


def _chart(kind: str, title: str, described: str, inside: str, above: str) -> str:
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)}</figcaption>{above}'
        f'<svg class="plot {kind}" width="100%" height="208" role="img" tabindex="0" '
        f'aria-label="{html.escape(described)}">{inside}</svg>'
        f'<p class="say" aria-live="polite" data-hint="{HINT}"></p></figure>'
    )


@dataclass(frozen=True)
class _Scale:
    """Where a value of x lies."""

    left: float
    right: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], log: bool) -> _Scale:
        log = log and min(values) > 0
        return cls(min(values), max(values), log)

    def x(self, value: float) -> float:
        """Return the place in percent of the width."""
        if self.left == self.right:
            return 50.0
        if self.log:
            return 100 * math.log(value / self.left) / math.log(self.right / self.left)
        return 100 * (value - self.left) / (self.right - self.left)

    def ticks(self) -> list[float]:
        """Return powers of ten, or round numbers, whole ones where there are two of them."""
        if self.left == self.right:
            return [self.left]
        if self.log:
            first, last = math.ceil(math.log10(self.left) - 1e-9), math.floor(math.log10(self.right) + 1e-9)
            ticks = [10.0**i for i in range(first, last + 1, math.ceil((last - first + 1) / 5) or 1)]
            return ticks if len(ticks) > 1 else [self.left, self.right]
        ticks = _ticks(self.left, self.right, 5)
        whole = [tick for tick in ticks if tick.is_integer()]
        return whole if len(whole) > 1 else ticks


@dataclass(frozen=True)
class _Axis:
    """The axis of y: what lies at its ends, and the numbers at its side."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], log: bool, zero: bool) -> _Axis:
        low, high = min(values), max(values)
        if log:
            first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
            last = max(last, first + 1)
            every = math.ceil((last - first) / 5)
            return cls(10.0**first, 10.0**last, True, tuple(10.0**i for i in range(first, last + 1, every)))
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if high == low:
            low, high = (0.0, 1.0) if zero else (low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1)
        ticks = _ticks(low, high, 4)
        step = ticks[1] - ticks[0]
        ends = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        steps = round((ends[1] - ends[0]) / step)
        return cls(*ends, False, tuple(round(ends[0] + i * step, 12) for i in range(steps + 1)))

    def y(self, value: float) -> float:
        """Return where a value lies, in pixels from the top."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(value) if self.log else value
        return TOP + HEIGHT * (1 - (at - low) / (high - low))

    def grid(self, percent: bool) -> str:
        parts = []
        for tick in self.ticks:
            y = self.y(tick)
            text = f"{100 * tick:g} %" if percent else f"{tick:.4g}"
            if self.log and not 1e-3 <= tick <= 1e3:
                text = "10" + f"{math.log10(tick):.0f}".translate(_RAISED)
            text = text.replace("-", "\N{MINUS SIGN}")
            parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        return "".join(parts)


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Return round numbers from `low` to `high`, about so many steps apart."""
    rough = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(s * size for s in (1, 2, 2.5, 5, 10) if s * size >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [round(i * step, 12) for i in range(first, last + 1)]
    return ticks if len(ticks) > 1 else [low, high]


def _is_known(value: float | None, log: bool = False) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not log)
