"""The report of one fine-tuning: what is known is drawn and tabulated, what is not known is left out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import finetune_bn as fbn
from finetune_bn.diagnosis.loading_code import timm_code
from finetune_bn.diagnosis.training_page import CLASSES_SHOWN
from finetune_bn.diagnosis.training_report import DomainResult, TrainingReport
from tests.models import settle

FULL = TrainingReport(
    title="a_net fine-tuned on Images",
    subtitle="BatchNorm: 3 x freeze",
    batch_norm="3 x freeze",
    history=[
        {"epoch": 0, "train_loss": None, "val_accuracy": 0.5},
        {"epoch": 1, "train_loss": 1.0, "val_accuracy": 0.6},
    ],
    results=[DomainResult("noto", 0.5, 10, 0.5, 0.0), DomainResult("fluent", 0.7, 20, 0.65, 2e-7)],
    overall=DomainResult("all", 0.63, 30, 0.6, 2e-7),
    test_metrics={"test_loss": 0.9},
    confusion=torch.tensor([[8, 2, 0], [5, 15, 0], [0, 0, 0]]),
    class_names=["cat", "dog", "never seen"],
    checkpoint="../best.ckpt",
    loading_code="import timm",
    tolerance=1e-4,
    versions={"torch": "2"},
)


def texts(figure: Any) -> set[str]:
    """Return the titles of the panels."""
    return {axes.get_title(loc="left") for axes in figure.get_axes()} - {""}


@pytest.mark.parametrize(
    ("report", "panels"),
    [
        (FULL, {"Loss", "Accuracy", "Test accuracy (dashed: all images, 63.0 %)", "Confusion matrix"}),
        (TrainingReport("t", history=FULL.history), {"Loss", "Accuracy"}),
        (TrainingReport("t", history=[{"epoch": 0, "loss": 1.0}], results=FULL.results), {"Loss", "Test accuracy"}),
        (TrainingReport("t", results=FULL.results), {"Test accuracy"}),
        (TrainingReport("t", confusion=FULL.confusion, class_names=FULL.class_names), {"Confusion matrix"}),
        (TrainingReport("t", results=[DomainResult("noto")]), set()),
        (TrainingReport("t"), set()),
    ],
)
def test_the_figure_has_a_panel_for_what_there_is_and_for_nothing_else(
    report: TrainingReport, panels: set[str]
) -> None:
    figure = report.figure()
    figure.draw_without_rendering()
    assert texts(figure) == panels


@pytest.mark.parametrize("classes", [3, 9, 30, 60])
def test_no_panel_of_the_figure_reaches_into_another_or_over_the_edge(classes: int) -> None:
    names = [f"class {i} of many in here" for i in range(classes)]
    figure = replace(FULL, confusion=torch.ones(classes, classes), class_names=names).figure()
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.get_axes()]
    titles = [text.get_window_extent() for text in figure.subfigs[0].texts]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= min(title.y0 for title in titles)
        for other in boxes[i + 1 :]:
            assert not box.overlaps(other)


def test_a_title_with_dollar_signs_is_no_formula() -> None:
    figure = TrainingReport("a $1 net", subtitle="for $2").figure()
    figure.draw_without_rendering()
    assert [text.get_parse_math() for text in figure.subfigs[0].texts] == [False, False]


def test_columns_of_which_nothing_is_known_are_left_out_of_the_table() -> None:
    assert FULL.rows()[0] == ["domain", "images", "accuracy", "in plain timm", "logits differ by"]
    assert FULL.rows()[1][1] == ["fluent", "20", "70.0 %", "65.0 %", "2.0e-07"]
    header, rows = TrainingReport("t", results=[DomainResult("noto", 0.5)]).rows()
    assert (header, rows) == (["domain", "accuracy"], [["noto", "50.0 %"]])


def test_the_page_lists_classes_from_worst_to_best_with_what_they_are_mistaken_for() -> None:
    page = FULL.page()
    text = '<td class="text">'
    bar = '<td class="bar" style="--share: '
    cat = f'{text}dog</td><td>20</td>{bar}75.0%">75.0 %</td><td>88.2 %</td>{text}cat (5)</td>'
    dog = f'{text}cat</td><td>10</td>{bar}80.0%">80.0 %</td><td>61.5 %</td>{text}dog (2)</td>'
    assert -1 < page.index(cat) < page.index(dog)
    assert f"{text}never seen</td>" not in page


def test_many_classes_are_cut_to_the_worst_and_the_page_says_so() -> None:
    classes = CLASSES_SHOWN + 20
    confusion = torch.eye(classes).long() * 9 + 1
    page = replace(FULL, confusion=confusion, class_names=[f"class {i}" for i in range(classes)]).page()
    assert f"Classes ({CLASSES_SHOWN} of {classes}, worst first)" in page
    assert page.count('<tr><td class="text">class ') == CLASSES_SHOWN


def test_errors_stand_first_and_what_was_left_out_is_on_the_page() -> None:
    page = replace(FULL, errors=["it broke"], notes=["no test"]).page()
    assert page.index("it broke") < page.index("Test accuracy")
    assert "no test" in page
    assert "not finite" in page
    assert '<ul class="error">' not in FULL.page()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"history": [*FULL.history, {"epoch": 2, "train_loss": None}]}, "train_loss in epoch 2"),
        ({"test_metrics": {"test_loss": math.nan}}, "not finite were test_loss"),
    ],
)
def test_a_run_that_diverged_says_so_first_and_its_accuracy_is_no_headline(change: dict[str, Any], words: str) -> None:
    report = replace(FULL, **change)
    page = report.page()
    assert words in report.diverged
    headline = page.index('<p class="verdict bad"><strong>Diverged</strong>')
    assert headline < page.index(words) < page.index("Test accuracy")
    assert "<strong>63.0 %" not in page
    figure = report.figure()
    assert figure.subfigs[0].texts[0].get_text() == "DIVERGED: a_net fine-tuned on Images"
    assert report.to_dict()["diverged"] == report.diverged


def test_the_headline_is_the_accuracy_over_all_images_and_nothing_without_a_test() -> None:
    assert '<p class="verdict good"><strong>63.0 %</strong> of 30 test images right' in FULL.page()
    assert FULL.diverged == ""  # one epoch that was not finite, and went on
    single = replace(FULL, results=FULL.results[:1], overall=None, errors=["it broke"])
    assert '<p class="verdict bad"><strong>50.0 %</strong> of 10 test images right' in single.page()
    assert "verdict" not in TrainingReport("t").page().partition("</style>")[2]


def test_the_status_of_the_layers_is_on_the_page_and_in_the_data() -> None:
    model = fbn.convert(settle(timm.create_model("test_resnet")), fbn.Freeze("shift"))
    model.bn1.weight.requires_grad_(True)
    report = replace(FULL, layers=fbn.status(model))
    page = report.page()
    assert '<td class="text">freeze, affine=shift</td>' in page
    assert "bn1: a constant requires a gradient" in page
    assert report.to_dict()["layers"] == fbn.status(model).to_dict()


def test_names_of_classes_layers_and_files_are_text_on_the_page() -> None:
    nasty = "<script>alert(1)</script>"

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(nasty, torch.nn.BatchNorm2d(2))

    report = replace(
        FULL,
        title=nasty,
        subtitle=nasty,
        batch_norm=nasty,
        layers=fbn.status(Named()),
        results=[DomainResult(nasty, 0.5, 10), DomainResult("b", 0.5, 10)],
        class_names=[nasty, "dog", "c"],
        model_file=nasty,
        checkpoint=nasty,
        loading_code=timm_code(nasty, 3, nasty, {}),
        test_metrics={nasty: 1.0},
        errors=[nasty],
        notes=[nasty],
        history=[{"epoch": 0, f"loss {nasty}": 1.0}],
        versions={nasty: nasty},
    )
    page = report.page()
    assert page.count("<script") == 1  # the page's own
    assert page.count("&lt;script&gt;alert(1)") > 20


def test_writing_makes_three_files_that_agree(tmp_path: Path) -> None:
    page = FULL.write(tmp_path / "report")
    assert page == tmp_path / "report" / "report.html"
    data = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert data["confusion"] == FULL.confusion.tolist()
    assert data["results"][1] == {
        "domain": "fluent",
        "accuracy": 0.7,
        "images": 20,
        "reloaded": 0.65,
        "difference": 2e-7,
    }
    assert data["history"] == FULL.history
    width, height = Image.open(tmp_path / "report" / "report.png").size
    assert width > height > 1000
    assert page.read_text(encoding="utf-8").count('<svg class="plot curves"') == 2


def test_the_loading_code_runs_and_refuses_a_checkpoint_of_another_net(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet", num_classes=3, drop_rate=0.5)
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"state_dict": state | {"metric.total": torch.zeros(1)}}, tmp_path / "a'b.ckpt")
    code = timm_code("test_resnet", 3, str(tmp_path / "a'b.ckpt"), {"drop_rate": 0.5})
    names: dict[str, Any] = {}
    exec(code, names)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(names["model"](images), net.eval()(images))
    with pytest.raises(RuntimeError, match="size mismatch"):
        exec(timm_code("test_resnet", 4, str(tmp_path / "a'b.ckpt"), {}), {})
