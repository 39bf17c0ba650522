"""Plots of a page: what is drawn where, what is said of it, and what is left out."""

from __future__ import annotations

import html
import math
import re

import pytest

from finetune_bn.diagnosis.page_plots import HEIGHT, TOP, Bars, Curve, html_curves, html_layers

NASTY = """<script>alert('&"')</script>"""


def bars(page: str) -> list[tuple[float, float]]:
    """Return top and height of each bar."""
    found = re.findall(r'<rect data-mark [^>]*? y="([\d.]+)" [^>]*?height="([\d.]+)"', page)
    return [(float(top), float(height)) for top, height in found]


def one_panel(panel: Bars, names: list[str] | None = None) -> str:
    names = names or [f"bn{i}" for i in range(len(panel.values))]
    return html_layers(names, [panel], ["layer", "x"], [[name, ""] for name in names])


def test_bars_are_as_high_as_their_numbers_and_below_zero_hang_from_it() -> None:
    up, double, down = bars(one_panel(Bars("x", [1.0, 2.0, -1.0])))
    assert double[1] == pytest.approx(2 * up[1], abs=0.11)
    assert up[0] + up[1] == pytest.approx(down[0], abs=0.11)  # where 0 is
    assert down[1] == pytest.approx(up[1], abs=0.11)
    assert double[0] >= TOP
    assert down[0] + down[1] <= TOP + HEIGHT


def test_a_tenfold_number_is_one_step_higher_on_a_logarithmic_axis() -> None:
    page = one_panel(Bars("x", [20, 200, 2000, 1e5, 0, -3], log=True, digits=",.0f"))
    heights = [height for _, height in bars(page)]
    assert heights[2] - heights[1] == pytest.approx(heights[1] - heights[0], abs=0.11)
    assert heights[4:] == [0, 0]
    assert "bn3: 100,000</title>" in page
    assert ">10⁵</text>" in page


def test_what_is_not_known_has_no_bar_keeps_its_place_and_says_so() -> None:
    page = one_panel(Bars("x", [1.0, None, math.nan, 2.0]))
    assert [height > 0 for _, height in bars(page)] == [True, False, False, True]
    assert "bn1: not known</title>" in page
    assert "bn2: nan</title>" in page
    assert re.findall(r'data-mark x="([\d.]+)%"', page) == ["0.000", "25.000", "50.000", "75.000"]


def test_a_panel_without_a_number_is_left_out_and_its_table_stays() -> None:
    page = one_panel(Bars("x", [None, None]))
    assert "<svg" not in page
    assert page.count("<tr>") == 3
    assert html_layers([], [Bars("x", [])], ["layer"], []) == ""


def test_a_bound_is_drawn_where_it_is_and_named() -> None:
    page = one_panel(Bars("x", [1.0], line=4.0, line_label="the <bound>"))
    assert 'class="mark"' in page
    assert "the &lt;bound&gt;" in page
    assert bars(page)[0][1] < HEIGHT / 3  # there is room for it


def test_names_are_text_in_plots_and_in_what_is_said() -> None:
    page = one_panel(Bars(NASTY, [1.0], line=1.0, line_label=NASTY), [NASTY])
    page += html_curves(NASTY, [Curve(NASTY, [(0, 1.0)], about=NASTY)], NASTY, table=NASTY)
    assert "<script" not in page
    assert page.count(html.escape(NASTY)) >= 10


def test_a_curve_has_a_gap_where_a_value_is_not_finite() -> None:
    page = html_curves(
        "loss", [Curve("a", [(1, 3.0), (2, 2.0), (3, math.nan), (4, None), (5, 1.0), (6, 1.5)])], "epoch"
    )
    assert page.count("<polyline") == 2
    assert page.count("<circle") == 4
    assert "a, epoch 5: 1</title>" in page
    assert html_curves("loss", [Curve("a", [(1, None)])], "epoch") == ""


def test_curves_of_one_label_are_one_color_and_one_line_in_the_legend() -> None:
    curves = [
        Curve("a", [(1, 1.0), (2, 2.0)]),
        Curve("b", [(1, 2.0), (2, 3.0)]),
        Curve("a", [(1, 3.0), (2, 1.0)], faint=True),
    ]
    page = html_curves("score", curves, "step")
    assert re.findall(r'<li data-curve="(\d)">', page) == ["0", "1"]
    assert re.findall(r'<polyline class="(k\d)', page) == ["k0", "k1", "k0"]
    assert page.count("faint") == 1


def test_a_single_point_lies_in_the_middle_with_its_own_number_below() -> None:
    page = html_curves("accuracy", [Curve("a", [(1, 0.5)])], "epoch", percent=True)
    assert 'cx="50.00%"' in page
    assert re.findall(r'y="194" text-anchor="middle">([^<]*)<', page) == ["1"]
    assert "a, epoch 1: 50.0 %</title>" in page


def test_epochs_are_whole_numbers_and_rates_are_powers_of_ten() -> None:
    epochs = html_curves("loss", [Curve("a", [(1, 1.0), (2, 2.0), (3, 2.5)])], "epoch")
    assert re.findall(r'y="194" text-anchor="middle">([^<]*)<', epochs) == ["1", "2", "3"]
    rates = html_curves("score", [Curve("a", [(1e-4, 1.0), (1e-3, 2.0), (1e-2, 2.5)])], "lr", xlog=True)
    assert re.findall(r'y="194" text-anchor="middle">([^<]*)<', rates) == ["0.0001", "0.001", "0.01"]
    assert re.findall(r'cx="([\d.]+)%"', rates) == ["0.00", "50.00", "100.00"]
