"""A page holds all it shows, shows texts as they are, and fits a phone."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetune_bn.diagnosis.page import (
    html_code,
    html_figures,
    html_list,
    html_page,
    html_table,
    html_text,
    html_verdict,
)
from finetune_bn.utilities.rendering import new_figure, svg

NASTY = """<script>alert('&"')</script>"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to look at the page with")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_is_as_wide_as_the_screen_and_what_is_wider_scrolls_by_itself(tmp_path: Path, width: int) -> None:
    frame = (
        f'<iframe id="f" style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(whole_page())}"></iframe>'
    )
    look = """<script>document.getElementById("f").onload = event => {
      const page = event.target.contentDocument, wide = [...page.querySelectorAll(".wide")];
      const outside = [...page.querySelectorAll("section, h1, p, pre, .wide")]
        .filter(part => part.getBoundingClientRect().right > page.documentElement.clientWidth + 1);
      document.title = [page.documentElement.scrollWidth - page.documentElement.clientWidth, outside.length,
        wide.filter(part => part.scrollWidth > part.clientWidth).length].join(" ");
    }</script>"""
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><title>no</title>{frame}{look}", encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [str(CHROMIUM), *options, profile, "--virtual-time-budget=5000", f"file://{tmp_path / 'frame.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    title = re.search(r"<title>([^<]*)</title>", done.stdout)
    assert title is not None
    too_wide, outside, scrolling = map(int, title[1].split())
    assert (too_wide, outside) == (0, 0)
    assert scrolling >= 1
