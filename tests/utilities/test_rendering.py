"""Figures as files: made without a display, with each character drawn or named, in the colors of their page."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from finetune_bn.diagnosis.figures import confusion_matrix, learning_curves
from finetune_bn.errors import MissingDependency
from finetune_bn.utilities import rendering
from finetune_bn.utilities.rendering import drawable, fonts, new_figure, png, svg

STRANGE = ["plain", "\u732b", "\U0001f355 pizza", "<b>&"]


def matrix() -> Any:
    with fonts():
        figure = new_figure(5, 5)
        confusion_matrix(figure.subplots(), torch.eye(4), STRANGE)
    return figure


def test_a_figure_is_made_without_pyplot_and_without_a_display(tmp_path: Path) -> None:
    code = (
        "import sys; from finetune_bn.utilities.rendering import *; from finetune_bn.diagnosis.figures import *;"
        "f = new_figure(2, 2);"
        "domain_bars(f.subplots(), {'a': 0.5});"
        f"open({str(tmp_path / 'a.png')!r}, 'wb').write(png(f));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[2])
    assert Image.open(tmp_path / "a.png").size == (300, 300)


def test_a_png_has_the_size_of_its_figure_times_dpi() -> None:
    assert Image.open(io.BytesIO(png(new_figure(3, 2), dpi=50))).size == (150, 100)


def test_a_missing_matplotlib_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependency, match="pip install matplotlib"):
        new_figure(1, 1)


def test_a_character_that_no_font_has_is_written_as_its_code_and_nothing_is_a_box(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendering, "_families", lambda: ("DejaVu Sans",))
    rendering._characters.cache_clear()
    assert [drawable(text) for text in STRANGE] == ["plain", "U+732B", "U+1F355 pizza", "<b>&"]
    figure = matrix()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of glyphs that are missing
        png(figure)
    (axes, _) = figure.get_axes()
    assert [label.get_text() for label in axes.get_xticklabels()][1] == "U+732B"
    assert not axes.get_xticklabels()[3].get_parse_math()
    rendering._characters.cache_clear()


def test_a_font_that_has_the_character_is_used_where_one_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.font_manager import fontManager

    assert rendering._families()[0] == "DejaVu Sans"
    assert set(rendering._families()) <= {font.name for font in fontManager.ttflist}
    monkeypatch.setattr(rendering, "_characters", lambda: frozenset({*range(128), 0x732B}))
    assert drawable("\u732b") == "\u732b"


def test_an_svg_is_a_part_of_a_page_with_texts_as_texts_and_its_colors() -> None:
    text = svg(matrix(), "confusion")
    assert text.startswith("<svg")
    assert text.endswith("</svg>")
    assert re.search(r"https?:|<!|<\?xml|<metadata|<script", text) is None
    assert "\u732b (1)" in text  # the browser has fonts of its own
    assert "&lt;b&gt;&amp;" in text
    assert "currentColor" in text
    assert "var(--line)" in text
    assert not re.search(r"^<svg[^>]* (width|height)=", text)


def test_two_figures_on_a_page_share_no_id_and_refer_to_their_own() -> None:
    def curves(name: str) -> str:
        figure = new_figure(3, 2)
        learning_curves(figure.subplots(), [{"epoch": 0, "loss": 1.0}, {"epoch": 1, "loss": 0.5}])
        return svg(figure, name)

    one, other = curves("one"), curves("two")
    ids = [set(re.findall(r'\bid="([^"]*)"', text)) for text in (one, other)]
    assert ids[0].isdisjoint(ids[1])
    for text, own in zip((one, other), ids, strict=True):
        used = set(re.findall(r'(?:url\(#|href="#)([^")]*)', text))
        assert used
        assert used <= own
    assert curves("one") == one
