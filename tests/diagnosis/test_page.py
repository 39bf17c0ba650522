"""A page holds all it shows, shows texts as they are, and fits a phone."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import pytest

from finetune_bn.diagnosis.page import (
    TALL,
    Picture,
    html_code,
    html_figures,
    html_images,
    html_list,
    html_page,
    html_table,
    html_text,
    html_verdict,
)
from finetune_bn.utilities.rendering import new_figure, svg

NASTY = """<script>alert('&"')</script>"""


class Balanced(HTMLParser):
    """Fails on a tag that is closed and was not open, or stays open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def figure(name: str = "one") -> str:
    drawn = new_figure(5, 3)
    drawn.subplots().set_title(NASTY, parse_math=False)
    return svg(drawn, name)


def whole_page() -> str:
    sections = [
        ("", html_verdict(NASTY, NASTY, "bad")),
        (NASTY, html_table([NASTY, "b"], [[NASTY, 1], [2, "a long name without any blank in it" * 3]], texts=(0, 1))),
        ("code", html_code(NASTY + "_" * 300)),
        ("", html_figures([(figure(), NASTY, 5, False), (figure("two"), NASTY, 30, True)])),
        ("list", html_list([NASTY], "error") + html_text(NASTY)),
    ]
    return html_page(NASTY, sections, NASTY)


def test_a_page_is_well_formed_and_shows_every_text_as_it_was_given() -> None:
    page = whole_page()
    assert Balanced(page).seen.count("script") == 1  # the page's own
    shown = html.escape(NASTY)
    assert page.count(shown) == 14
    assert page.count("&lt;script&gt;") == 16  # and those that matplotlib wrote


def test_a_section_with_nothing_in_it_is_left_out() -> None:
    page = html_page("title", [("empty", html_list([])), ("none", html_table(["a"], [])), ("no", html_figures([]))])
    assert "<h2>" not in page


def test_a_page_loads_nothing() -> None:
    page = whole_page()
    assert re.findall(r"https?:|<link|@import|src=", page) == []
    assert {target[0] for target in re.findall(r"(?:href=.|url\()(.)", page)} == {"#"}


def test_figures_and_tables_have_words_for_those_who_do_not_see_them() -> None:
    page = html_figures([(figure(), "loss over the epochs", 5, False)]) + html_table(["class", "recall"], [["a", 1]])
    assert 'role="img" aria-label="loss over the epochs"' in page
    assert 'tabindex="0" role="region" aria-label="table: class, recall"' in page
    assert page.count('<th scope="col"') == 2


def luminance(color: str) -> float:
    """Return the relative luminance of `#rgb` or `#rrggbb`, as WCAG 2.2 defines it."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_letters_and_lines_stand_out_from_their_ground_in_light_and_in_dark(mode: int) -> None:
    style = resources.files("finetune_bn.diagnosis").joinpath("page.css").read_text(encoding="utf-8")
    palettes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(palettes) == 2
    colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6})\b", palettes[mode]))
    grounds = {"ink": ("page", "panel", "bar", "on", "badpanel")} | dict.fromkeys(
        ("soft", "good", "bad", "note"), ("page",)
    )
    for ink, below in grounds.items():
        for ground in below:
            assert contrast(colors[ink], colors[ground]) >= 4.5, (ink, ground)
    lines = [name for name in colors if re.fullmatch(r"c\d", name)]
    assert len(lines) == 7
    assert [name for name in lines if contrast(colors[name], colors["page"]) < 3] == []


def test_the_policy_of_a_page_allows_its_own_script_and_nothing_else() -> None:
    page = html_page("title", [])
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{digest}';" in page
    assert "unsafe-eval" not in page


def test_a_picture_is_held_by_the_page_and_cells_are_filled_to_their_share() -> None:
    page = html_images([Picture(b"\x89PNG....", NASTY, NASTY, NASTY)])
    assert page.count(html.escape(NASTY)) == 3
    assert "data:image/png;base64,iVBORy4uLi4=" in page
    assert html_images([]) == ""
    table = html_table(["a", "b"], [["x", "1"], ["y", "2"]], bars={1: [0.5, None]})
    assert '<td class="bar" style="--share: 50.0%">1</td>' in table
    assert "<td>2</td>" in table


def test_a_long_table_scrolls_in_a_frame_of_its_own_and_facts_do_not_sort() -> None:
    rows = [[str(i)] for i in range(TALL + 1)]
    assert 'class="wide tall"' in html_table(["a"], rows)
    assert 'class="wide"' in html_table(["a"], rows[:-1])
    assert 'class="wide fixed"' in html_table(["a"], rows[:2], sortable=False)
