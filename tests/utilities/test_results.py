"""Whatever a verb returns can be printed, shown by a notebook, stored, and, where there is a picture, drawn."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch

import finetune_bn as fbn
from finetune_bn.errors import MissingDependency
from finetune_bn.utilities.results import Result, Shown
from finetune_bn.utilities.tables import html_table
from tests.models import settle

ROWS = {
    "PlanRow",
    "LayerRecord",
    "LayerFit",
    "LayerMemory",
    "LayerStatus",
    "Finding",
    "LayerDiagnosis",
}  # of a result, and shown by it


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """One of each, of a small network."""
    torch.manual_seed(0)
    images, others = torch.randn(2, 8, 3, 32, 32)
    net, frozen, grouped, live = (settle(timm.create_model("test_resnet", num_classes=3)) for _ in range(4))
    fbn.convert(frozen, fbn.Freeze())
    fbn.convert(grouped, fbn.ToGroupNorm())
    return {
        "Plan": fbn.plan(net, fbn.Freeze(), images[:1]),
        "Recalibration": fbn.recalibrate(frozen, [images], progress=False),
        "MemoryReport": fbn.memory_report(net, images[:2], fbn.Freeze()),
        "Leakage": fbn.measure_leakage(live, images, others),
        "Status": fbn.status(net),
        "Calibration": fbn.calibrate_group_norm(grouped, [images], progress=False),
        "Distillation": fbn.Distillation(8, 4, 0.5, 0.25),
        "Trained": fbn.train_only(net),
        "Prediction": fbn.Prediction("a<b>.png", ("cat", "dog"), (0.75, 0.25)),
        "Embedding": fbn.Embedding("a<b>.png", torch.ones(3)),
    }


def classes_of_the_face() -> dict[str, type]:
    """Return what the verbs return, by name: the dataclasses of the face that are no rows and no policies."""
    named = {name: getattr(fbn, name) for name in fbn.__all__}
    return {
        name: thing
        for name, thing in named.items()
        if inspect.isclass(thing) and hasattr(thing, "__dataclass_fields__") and not issubclass(thing, fbn.Policy)
        if name not in ROWS | {"Rule", "Rules"}
    }


def test_every_class_that_a_verb_returns_is_a_result(results: dict[str, Any]) -> None:
    found = classes_of_the_face()
    assert set(results) <= set(found)
    assert [name for name, thing in found.items() if not issubclass(thing, Result)] == []


def test_each_is_shown_as_a_table_with_what_print_says_stored_as_json_and_drawn(results: dict[str, Any]) -> None:
    for name, result in results.items():
        page = result._repr_html_()
        shown = result.shown()
        assert str(result).startswith(shown.title), name
        assert page.count("<tr>") == (1 + len(shown.rows) if shown.rows else 0), name
        assert "<b>" not in page, name
        assert json.loads(result.to_json()), name
        assert json.loads(json.dumps(result.to_dict())), name
        if hasattr(result, "plot"):
            figure = result.plot()
            (axes,) = figure.get_axes()
            assert sum(bar.get_height() > 0 for bar in axes.patches) > 0, name
            figure.draw_without_rendering()
    assert [name for name, result in results.items() if hasattr(result, "plot")] == [
        *("Plan", "Recalibration", "MemoryReport", "Leakage", "Status", "Calibration")
    ]


def test_the_bars_of_a_figure_are_the_numbers_of_the_result(results: dict[str, Any]) -> None:
    record = results["Recalibration"]
    (axes,) = record.plot().get_axes()
    assert [bar.get_height() for bar in axes.patches] == [row.shift for row in record.rows]
    assert [label.get_text() for label in axes.get_xticklabels()] == [row.names[0] for row in record.rows]
    report = results["MemoryReport"]
    (axes,) = report.plot().get_axes()
    assert sum(bar.get_height() for bar in axes.patches) == pytest.approx((report.before + report.after) / 2**20)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["as it is", report.policy]


def test_a_plan_in_color_has_each_layer_once(results: dict[str, Any]) -> None:
    (axes,) = results["Plan"].plot().get_axes()
    heights = [bar.get_height() for bar in axes.patches if bar.get_height() > 0]  # NaN is drawn nowhere
    assert sorted(heights) == sorted(row.num_features for row in results["Plan"].rows)


@dataclass(frozen=True)
class Nasty(Result):
    """Names that are HTML."""

    def to_dict(self) -> dict[str, Any]:
        return {"a": float("nan"), "b": 0.1 + 0.2}

    def shown(self) -> Shown:
        return Shown("<i>title</i>", ["<i>a</i>", "b"], [["<i>x</i>", "1"]], ["<i>note</i>"], right=(1,))


def test_what_a_notebook_shows_is_text_and_numbers_are_set_flush_right() -> None:
    page = Nasty()._repr_html_()
    assert "<i>" not in page
    assert page.count("&lt;i&gt;") == 5  # once more in the label of the frame
    assert '<td class="text">&lt;i&gt;x&lt;/i&gt;</td><td>1</td>' in page
    assert str(Nasty()).splitlines() == ["<i>title</i>", "<i>a</i>  b", "-" * 11, "<i>x</i>  1", "<i>note</i>"]
    assert json.loads(Nasty().to_json()) == {"a": None, "b": 0.3}


def test_a_table_without_rows_is_nothing_and_a_row_of_another_length_an_error() -> None:
    assert html_table(["a"], []) == ""
    with pytest.raises(ValueError, match="zip"):
        html_table(["a"], [["1", "2"]])


def test_without_matplotlib_only_plot_fails_and_says_what_to_install(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert results["Plan"]._repr_html_()
    with pytest.raises(MissingDependency, match="pip install matplotlib"):
        results["Plan"].plot()
