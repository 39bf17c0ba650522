"""Pages of a diagnosis and of a comparison: the verdict first, what is known and nothing else."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_bn.diagnosis.comparison_page import comparison_page
from finetune_bn.diagnosis.diagnosis_page import diagnosis_page
from tests.diagnosis.sample_pages import NASTY, advice, comparison, diagnosis


def rows_of(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading, as texts."""
    section = page.partition(f"<h2>{heading}</h2>")[2].partition("</section>")[0]
    body = section.partition("<tbody>")[2]
    return [
        [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    ]


def verdict(page: str) -> tuple[str, str, str]:
    """Return kind, words and sentence of the verdict."""
    found = re.search(r'<p class="verdict (\w+)"><strong>(.*?)</strong> (.*?)</p>', page)
    assert found is not None
    assert found.start() < page.index("<h2>")
    return found[1], found[2], found[3]


def test_the_verdict_is_the_worst_finding_or_the_advice_where_there_is_one() -> None:
    data = diagnosis(4)
    assert verdict(diagnosis_page(data.to_dict()))[:2] == ("bad", "A problem")
    fine = replace(data, findings=data.findings[3:])
    assert verdict(diagnosis_page(fine.to_dict())) == ("good", "Nothing stands in the way", "1 thing was looked at.")
    notes = replace(data, findings=(data.findings[2], data.findings[2]))
    assert verdict(diagnosis_page(notes.to_dict()))[:2] == ("note", "2 notes")
    page = diagnosis_page(data.to_dict(), advice().to_dict())
    assert verdict(page) == ("good", advice().title, advice().sure)
    order = [page.index(f"<h2>{heading}</h2>") for heading in ("Why", "Do it", "Findings", "Layers", "Batches")]
    assert order == sorted(order)
    assert "policy: &lt;finetune_bn.Freeze&gt;" in page


def test_every_layer_has_its_numbers_and_what_is_not_known_is_no_number() -> None:
    data = diagnosis(8)
    rows = rows_of(diagnosis_page(data.to_dict()), "Layers")
    assert [row[0] for row in rows] == [layer.name for layer in data.layers]
    assert rows[1][4] == f"{data.layers[1].shift_mean:.3f}"
    assert rows[5][4:6] == ["", "not finite"]
    assert math.isnan(data.layers[5].log_var_ratio or 0)


def test_facts_that_were_not_measured_are_left_out_and_memory_is_in_mib_with_bars() -> None:
    page = diagnosis_page(diagnosis(4).to_dict())
    batches = dict(rows_of(page, "Batches"))
    assert batches["images a batch and device"] == "32"
    assert batches["independent?"] == "they are no independent draws"
    assert not [name for name in batches if "training mode" in name or "one value" in name]
    header = page.partition("Memory and launches of a policy")[2]
    assert "largest batch in 8 GiB" in header
    memory = rows_of(page, "Memory and launches of a policy")
    assert memory[0] == ["as it is", "42.06", "812", "96", "310"]
    assert memory[2] == ["freeze, affine=original", "29.56", "", "", ""]
    assert '<td class="bar" style="--share: 66.7%">28.04</td>' in page


def test_without_curvature_memory_and_layers_there_are_no_such_sections() -> None:
    bare = replace(diagnosis(0), curvature=None, memory=(), left_out=())
    page = diagnosis_page(bare.to_dict())
    assert re.findall("<h2>(.*?)</h2>", page) == ["Findings", "Batches"]


def test_names_sentences_and_overlays_are_text() -> None:
    for page in (diagnosis_page(diagnosis().to_dict(), advice().to_dict()), comparison_page(comparison().to_dict())):
        assert page.count("<script") == 1
        assert html.escape(NASTY) in page


def test_a_page_made_from_stored_json_is_the_same(tmp_path: Path) -> None:
    for result, make in ((diagnosis(), diagnosis_page), (comparison(), comparison_page)):
        result.save_html(tmp_path / "page.html")
        stored = json.loads(result.to_json())
        texts = (tmp_path / "page.html").read_text(encoding="utf-8"), make(stored)
        headings = [re.findall(r"<h2>(.*?)</h2>|<td[^>]*>([^<]*)</td>", text) for text in texts]
        assert len(headings[0]) == len(headings[1]) > 50


def test_the_best_treatment_is_the_verdict_with_its_spread_and_every_run_is_in_the_table() -> None:
    data = comparison()
    page = comparison_page(data.to_dict())
    kind, words, sentence = verdict(page)
    assert (kind, words) == ("good", data.table[0].arm)
    assert f"learning rate {data.table[0].lr:g}" in sentence
    assert "over 2 seeds" in sentence
    assert [row[0] for row in rows_of(page, "Treatments, best first")] == [row.arm for row in data.table]
    runs = rows_of(page, "All runs")
    assert len(runs) == len(data.runs)
    assert [row[-1] for row in runs].count("failed: the loss was not finite at step 12") == 2
    assert [row[-1] for row in runs].count("dropped at 40 steps") == 2
    assert page.count('<svg class="plot curves"') == 3


def test_where_no_treatment_could_be_trained_the_page_says_so() -> None:
    data = comparison()
    failed = tuple(replace(run, score=None, curve=((40, None),), losses=(), failed="NaN") for run in data.runs)
    page = comparison_page(replace(data, runs=failed).to_dict())
    assert verdict(page)[:2] == ("bad", "None")
    assert "<svg" not in page


@pytest.mark.parametrize("number", [1, 60])
def test_any_number_of_layers_is_drawn_and_a_long_table_scrolls(number: int) -> None:
    page = diagnosis_page(diagnosis(number).to_dict())
    assert page.count('<svg class="plot bars"') == 6
    assert page.count("<rect data-mark") == 6 * number
    assert ('class="wide tall"' in page) == (number > 20)


def test_a_notebook_shows_them_with_the_same_sentences_as_print() -> None:
    for result in (diagnosis(), advice(), comparison()):
        page = html.unescape(result._repr_html_())
        assert "<script>alert" not in result._repr_html_()
        shown = result.shown()
        assert all(sentence in page for sentence in (shown.title, *shown.lead, *shown.notes))
        assert str(result).startswith(shown.title)
        assert json.loads(result.to_json())
    for result in (diagnosis(), comparison()):
        assert len(result.plot().get_axes()) >= 1
