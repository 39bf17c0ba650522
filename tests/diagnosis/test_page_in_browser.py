"""The pages in headless Chromium: nothing is fetched, nothing is complained of, tables sort, plots answer."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from browser import Browser, find

from finetune_bn.diagnosis.comparison_page import comparison_sections
from finetune_bn.diagnosis.diagnosis_page import diagnosis_page
from finetune_bn.diagnosis.training_page import WorstImage
from tests.diagnosis.sample_pages import NASTY, advice, comparison, diagnosis
from tests.diagnosis.test_training_report import FULL

pytestmark = pytest.mark.skipif(find() is None, reason="there is no Chromium to look at the pages with")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(buffer, "JPEG")
    worst = [WorstImage(NASTY, "dog", 0.9, 3.2, "folder/" + "long" * 20 + ".png", "noto", buffer.getvalue())] * 3
    texts = {
        "answer": diagnosis_page(
            diagnosis().to_dict(), advice().to_dict(), more=comparison_sections(comparison().to_dict())
        ),
        "fit": replace(FULL, worst=worst, title=NASTY, errors=[NASTY]).page(),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser.start() as started:
        yield started


@pytest.fixture(scope="module")
def wide(browser: Browser, files: dict[str, Path]) -> Any:
    return browser.open(files["answer"], width=1280)


def cells(page: Any, column: int) -> list[str]:
    """Return the texts of a column of the table of layers, as the rows stand."""
    code = f"[...document.querySelectorAll('.linked tbody tr')].map(row => row.cells[{column}].textContent)"
    return list(page.evaluate(code))


def head(column: int) -> str:
    return f".linked th:nth-child({column + 1}) button"


@pytest.mark.parametrize("name", ["answer", "fit"])
def test_on_a_phone_in_the_dark_nothing_is_complained_of_fetched_or_cut(
    browser: Browser, files: dict[str, Path], name: str
) -> None:
    page = browser.open(files[name], width=390, dark=True)
    assert page.messages == []
    assert [address for address in page.requests if not address.startswith("data:image/")] == [files[name].as_uri()]
    outside = """[...document.querySelectorAll("section, h1, p, pre, .wide, figure.chart, .images figure")]
        .filter(part => part.getBoundingClientRect().right > document.documentElement.clientWidth + 1).length"""
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate(outside) == 0
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(int(part) for part in ground[4:-1].split(",")) < 150
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    # Letters keep their size, whatever the width.
    sizes = "[...document.querySelectorAll('svg.plot text')].map(text => text.getBoundingClientRect().height)"
    assert min(page.evaluate(sizes)) > 10


def test_names_are_text_and_no_script_but_the_page_s_own_runs(wide: Any) -> None:
    assert wide.evaluate("document.scripts.length") == 1
    assert NASTY in cells(wide, 0)
    wide.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'hacked = 1'}))")
    assert wide.evaluate("typeof hacked") == "undefined"
    assert [message for message in wide.messages if "Content Security Policy" in message]
    wide.messages.clear()


def test_what_would_be_fetched_is_refused_by_the_page_itself(wide: Any) -> None:
    wide.evaluate("new Image().src = 'http://127.0.0.1:9/a.png'; document.images.length")
    wide.evaluate("1")  # so that the refusal is heard
    (message,) = wide.messages
    assert "http://127.0.0.1:9/a.png" in message
    assert "The action has been blocked" in message
    wide.messages.clear()


def test_a_click_sorts_by_numbers_the_next_turns_round_and_the_third_undoes(wide: Any) -> None:
    before = cells(wide, 4)
    for way in ("descending", "ascending"):
        wide.click(head(4))
        assert wide.evaluate("document.querySelectorAll('.linked th')[4].ariaSort") == way
        known = [float(text) for text in cells(wide, 4) if text]
        assert known == sorted(known, reverse=way == "descending")
        assert cells(wide, 4)[-1] == ""  # what is not known comes last, either way
    wide.click(head(4))
    assert wide.evaluate("document.querySelectorAll('.linked th')[4].ariaSort") is None
    assert cells(wide, 4) == before
    assert wide.messages == []


def test_the_keyboard_sorts_texts_and_the_bars_follow_the_table(wide: Any) -> None:
    bars = "document.querySelector('.linked svg.bars').querySelectorAll('rect')"
    names = cells(wide, 0)
    wide.press("Enter", head(0))
    assert wide.evaluate("document.querySelectorAll('.linked th')[0].ariaSort") == "ascending"
    order = cells(wide, 0)
    assert order != names
    assert order[0] == NASTY
    assert order[1:] == sorted(order[1:])
    lefts = wide.evaluate(f"[...{bars}].map(bar => bar.x.baseVal.value)")
    assert [name for _, name in sorted(zip(lefts, names, strict=True))] == order
    wide.press("Enter", head(0))
    wide.press("Enter", head(0))
    assert cells(wide, 0) == names


def test_pointing_at_a_bar_says_its_layer_everywhere_and_lights_its_row(wide: Any) -> None:
    wide.hover(".linked svg.bars rect:nth-of-type(10)")
    said = wide.evaluate("[...document.querySelectorAll('.linked .say')].map(line => line.textContent)")
    names = cells(wide, 0)
    lit = wide.evaluate("[...document.querySelectorAll('.linked tr')].findIndex(row => row.matches('.on')) - 1")
    assert len(said) == 6
    assert all(text.startswith(f"{names[lit]}: ") for text in said)
    assert said[0] == f"{names[lit]}: {float(cells(wide, 4)[lit]):.3g}"
    wide.hover("h1")
    assert wide.evaluate("document.querySelectorAll('.linked .on').length") == 0


def test_pointing_at_a_row_lights_its_bars_and_the_arrow_keys_go_from_bar_to_bar(wide: Any) -> None:
    wide.hover(".linked tbody tr:nth-child(2) td")
    assert wide.evaluate("document.querySelectorAll('.linked rect.on').length") == 6
    names, say = cells(wide, 0), "document.querySelector('.linked .say').textContent"
    wide.hover("h1")
    wide.press("ArrowRight", ".linked svg.bars")
    wide.press("ArrowRight")
    assert wide.evaluate(say).startswith(f"{names[1]}: ")
    wide.press("ArrowLeft")
    assert wide.evaluate(say).startswith(f"{names[0]}: ")
    wide.press("Escape")
    assert "arrow keys" in wide.evaluate(say)


def test_a_curve_says_run_step_and_score_at_the_point_that_is_nearest(wide: Any) -> None:
    wide.hover("svg.curves circle:nth-of-type(3)")
    said = wide.evaluate("document.querySelector('svg.curves').parentNode.querySelector('.say').textContent")
    assert said == "limited, lr 0.1, mean of seeds, step 160: 0.6521"
    assert wide.messages == []
