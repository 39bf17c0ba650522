"""Make a matplotlib figure without `pyplot`, and render it as PNG, or as SVG that takes the colors of its page."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Iterator
from typing import Any

from finetune_bn.errors import MissingDependency, complaint

INK, FAINT = "#222222", "#d9d9d9"
# Okabe and Ito (2008): told apart with any kind of color vision, and by their lightness in print.
BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
FONT = 11.0  # points
# The first is a part of matplotlib; the others have the writing systems that it has not.
_FONTS = (
    "DejaVu Sans",
    *(f"Noto Sans CJK {region}" for region in ("SC", "JP", "KR", "TC")),
    *(f"Noto Sans {script}" for script in ("SC", "JP", "KR", "Devanagari", "Thai", "Arabic", "Hebrew", "Bengali")),
    *("Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Unifont"),
    *("Microsoft YaHei", "SimHei", "Yu Gothic", "Malgun Gothic", "Nirmala UI", "Segoe UI Emoji", "Segoe UI Symbol"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS", "Noto Emoji", "Symbola"),
)


def new_figure(width: float, height: float) -> Any:
    """Return an empty `matplotlib.figure.Figure` of that size in inches, whose parts are laid out without overlap.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        remedy = "Run: pip install matplotlib"
        raise MissingDependency(complaint("matplotlib", "not installed", "3.9 and newer", remedy)) from error
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    # What a notebook asks for. Without pyplot, which is not imported here, it would print the figure's size alone.
    figure._repr_png_ = functools.partial(png, figure, 100)  # type: ignore[attr-defined]
    return figure


@contextlib.contextmanager
def fonts() -> Iterator[None]:
    """Let texts be drawn in the first installed font that has each character; for making a figure and rendering it."""
    import matplotlib

    with matplotlib.rc_context({"font.family": list(_families())}):
        yield


def png(figure: Any, dpi: int = 150) -> bytes:
    """Render a figure as the bytes of a PNG file; a character that no font has is written as its code, `U+732B`."""
    from matplotlib.text import Text

    for axes in figure.get_axes():
        for axis in (axes.xaxis, axes.yaxis):
            names = [label.get_text() for label in axis.get_ticklabels()]
            if any(drawable(name) != name for name in names):  # numbers are left to their formatter
                axis.set_ticklabels([drawable(name) for name in names])
    for text in figure.findobj(Text):
        text.set_text(drawable(text.get_text()))
    buffer = io.BytesIO()
    with fonts():
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def svg(figure: Any, name: str) -> str:
    """Render a figure as an `<svg>` element for a page: texts stay texts, and its ink takes the page's colors.

    Args:
        figure: a figure of `new_figure`.
        name: unlike that of any other figure of the page.
    """
    import matplotlib

    buffer = io.StringIO()
    with fonts(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser has other fonts
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # An id is one for the whole page.
    text = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)
    return text.replace(INK, "currentColor").replace(FAINT, "var(--line)").strip()


def drawable(text: str) -> str:
    """Return a text in which characters that no installed font has are replaced by their codes."""
    known = _characters()
    return "".join(c if c in "\n\u200d\ufe0f" or ord(c) in known else f"U+{ord(c):04X}" for c in text)


@functools.cache
def _families() -> tuple[str, ...]:
    """Return the installed fonts of those that have many characters, the usual one first."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return tuple(name for name in _FONTS if name in installed)


@functools.cache
def _characters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    found: set[int] = set()
    for family in _families():
        found |= get_font(findfont(FontProperties(family=family))).get_charmap().keys()
    return frozenset(found)
