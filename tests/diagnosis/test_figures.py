"""Panels draw what they are given."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from finetune_bn.diagnosis.figures import (
    BLUE,
    GREEN,
    LABELS_UP_TO,
    NUMBERS_UP_TO,
    ORANGE,
    PURPLE,
    VERMILION,
    confusion_matrix,
    curve_names,
    domain_bars,
    learning_curves,
    shortened,
)
from finetune_bn.errors import FinetuneBNError
from finetune_bn.utilities.rendering import new_figure

HISTORY = [
    {"epoch": 0, "train_loss": 2.0, "val_loss": 1.5, "val_accuracy": 0.5, "val_accuracy/noto": 0.4},
    {"epoch": 1, "train_loss": 1.0},
    {"epoch": 2, "train_loss": None, "val_loss": 1.25, "val_accuracy": 0.75, "val_accuracy/noto": 0.9},
]


def make_axes() -> Any:
    return new_figure(6, 6).subplots()


def curves(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label().split()[0]: list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def line_gaps(axes: Any) -> list[float]:
    """Return how far apart neighboring names at the two axes are, across the text, in heights of their letters."""
    axes.figure.draw_without_rendering()
    gaps = []
    for axis, along, angle in ((axes.xaxis, 0, 45), (axes.yaxis, 1, 90)):
        labels = axis.get_ticklabels()
        places = [label.get_transform().transform(label.get_position())[along] for label in labels]
        across = [abs(b - a) * math.sin(math.radians(angle)) for a, b in itertools.pairwise(places)]
        gaps += [gap / (labels[0].get_fontsize() * axes.figure.dpi / 72) for gap in across]
    return gaps


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_a_curve_is_drawn_over_the_epochs_trained_and_skips_what_was_not_measured() -> None:
    axes = make_axes()
    learning_curves(axes, HISTORY, "loss")
    drawn = curves(axes)
    assert drawn["val_loss"] == [(1, 1.5), (3, 1.25)]
    assert drawn["train_loss"][:2] == [(1, 2.0), (2, 1.0)]
    assert math.isnan(drawn["train_loss"][2][1])


def test_shares_are_drawn_in_percent_and_other_accuracies_as_they_are() -> None:
    axes = make_axes()
    learning_curves(axes, HISTORY, "acc")
    assert curves(axes) == {"val_accuracy": [(1, 50.0), (3, 75.0)]}
    assert axes.get_ylabel() == "accuracy (%)"
    axes = make_axes()
    learning_curves(axes, [{"epoch": 0, "acc": 61.0}], "acc")
    assert curves(axes) == {"acc": [(1, 61.0)]}
    assert axes.get_ylabel() == "accuracy"


@pytest.mark.parametrize(
    ("word", "labels"),
    [("loss", ["train_loss (lowest 1)", "val_loss (lowest 1.25)"]), ("acc", ["val_accuracy (best 75.0 %)"])],
)
def test_the_legend_names_the_best_of_each_curve(word: str, labels: list[str]) -> None:
    axes = make_axes()
    learning_curves(axes, HISTORY, word)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == labels


def test_training_and_validation_have_their_colors_in_whatever_order_they_were_logged() -> None:
    for history in (HISTORY, [{"epoch": 0, "f_loss": 1.0, "val_loss": 1.0, "my_train_loss": 2.0, "train_loss_2": 1.0}]):
        axes = make_axes()
        learning_curves(axes, history, "loss")
        colors = {line.get_label().split()[0]: line.get_color() for line in axes.lines}
        assert colors["val_loss"] == VERMILION
        assert colors.get("my_train_loss", colors.get("train_loss")) == BLUE
        assert len(set(colors.values())) == len(colors)


def test_the_legend_covers_no_curve() -> None:
    axes = make_axes()
    learning_curves(axes, HISTORY, "loss")
    axes.figure.draw_without_rendering()
    assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1 - 1
    title = axes._left_title.get_window_extent()
    assert title.y0 >= axes.get_legend().get_window_extent().y1 - 1


def test_one_epoch_is_one_whole_number_at_the_axis() -> None:
    axes = make_axes()
    learning_curves(axes, HISTORY[:1], "loss")
    axes.figure.draw_without_rendering()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1"]
    for epochs in (2, 3, 9, 40):
        axes = make_axes()
        learning_curves(axes, [{"epoch": i, "loss": 1.0} for i in range(epochs)], "loss")
        axes.figure.draw_without_rendering()
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_a_part_is_left_out_where_the_whole_is_logged_and_kept_where_it_is_not() -> None:
    assert curve_names(HISTORY, "acc") == ["val_accuracy"]
    assert curve_names([{"epoch": 0, "train/loss": 1.0, "val/loss": 1.0}], "loss") == ["train/loss", "val/loss"]


def test_curves_of_a_word_that_nothing_is_named_by_are_refused() -> None:
    with pytest.raises(FinetuneBNError, match="word: got 'f1'; allowed: a part of one of epoch, train_loss"):
        learning_curves(make_axes(), HISTORY, "f1")
    with pytest.raises(FinetuneBNError, match="nothing was logged"):
        learning_curves(make_axes(), [], "loss")


def test_the_matrix_is_colored_by_share_of_the_true_class_and_numbered_by_count() -> None:
    counts = torch.tensor([[8, 2, 0], [0, 5, 0], [0, 0, 0]])
    axes = make_axes()
    confusion_matrix(axes, counts, ["cat", "dog", "$x_1$"])
    torch.testing.assert_close(
        torch.as_tensor(axes.images[0].get_array().filled()), torch.tensor([[0.8, 0.2, 0], [0, 1, 0], [0, 0, 0]])
    )
    numbers = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert numbers == {(0, 0): "8", (0, 1): "2", (1, 1): "5"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat (10)", "dog (5)", "$x_1$ (0)"]
    assert not any(label.get_parse_math() for label in axes.get_xticklabels())


@pytest.mark.parametrize("classes", [2, 9, NUMBERS_UP_TO, NUMBERS_UP_TO + 1, 97, 400])
def test_the_names_at_a_matrix_do_not_overlap_and_numbers_fit_their_cells(classes: int) -> None:
    figure = new_figure(11, 10)
    axes = figure.subplots()
    counts = torch.full((classes, classes), 1234) if classes <= 9 else torch.full((classes, classes), 12)
    confusion_matrix(axes, counts, [f"a class by the name of {i}" for i in range(classes)])
    assert min(line_gaps(axes)) > 0.95
    assert len(axes.get_xticklabels()) <= LABELS_UP_TO
    assert len(axes.texts) == (classes**2 if classes <= NUMBERS_UP_TO else 0)
    cell = axes.get_window_extent().width / classes
    assert all(text.get_window_extent().width < 0.95 * cell for text in axes.texts)
    assert all(text.get_fontsize() > 4.5 for text in axes.texts)


def test_a_matrix_that_is_not_of_its_classes_is_refused() -> None:
    with pytest.raises(FinetuneBNError, match=r"counts: got \(2, 3\); allowed: .* each of the 2 classes"):
        confusion_matrix(make_axes(), torch.zeros(2, 3), ["a", "b"])


def test_bars_have_the_length_of_the_accuracy_and_say_it() -> None:
    axes = make_axes()
    domain_bars(axes, {"noto": 0.75, "fluent": 0.1}, overall=0.5)
    assert [bar.get_width() for bar in axes.patches] == [75.0, 10.0]
    assert [text.get_text() for text in axes.texts] == ["75.0 %", "10.0 %"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["noto", "fluent"]
    assert list(axes.lines[0].get_xdata()) == [50.0, 50.0]
    top, bottom = (bar.get_window_extent().y0 for bar in axes.patches)
    assert top > bottom


@pytest.mark.parametrize("accuracies", [{}, {"noto": 75.0}, {"noto": -0.1}])
def test_bars_of_what_is_no_share_are_refused(accuracies: dict[str, float]) -> None:
    with pytest.raises(FinetuneBNError, match="accuracies: got"):
        domain_bars(make_axes(), accuracies)


def test_colors_of_curves_differ_in_print_and_stand_out_from_white() -> None:
    shades = sorted(luminance(color) for color in (BLUE, VERMILION, GREEN, PURPLE, ORANGE))
    assert luminance(VERMILION) - luminance(BLUE) > 0.05
    assert shades[-1] < 0.5


def test_a_long_name_is_cut_with_an_ellipsis_and_a_short_one_is_not() -> None:
    assert shortened("a" * 22) == "a" * 22
    assert shortened("a" * 23) == "a" * 21 + "…"
