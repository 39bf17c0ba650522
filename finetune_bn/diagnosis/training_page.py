"""Parts of the page of a fine-tuning, each from plain data: curves, classes, epochs, the images it is most wrong of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from finetune_bn.diagnosis.figures import History, curve_names
from finetune_bn.diagnosis.page import Picture, html_images, html_table, html_text
from finetune_bn.diagnosis.page_plots import Curve, html_curves

CLASSES_SHOWN = 50


@dataclass(frozen=True)
class WorstImage:
    """An image of which the network was most wrong.

    Attributes:
        true: its class.
        predicted: what it was taken for.
        probability: of what it was taken for, 0 to 1.
        loss: cross-entropy of its class.
        name: what the user knows it by, where that is known.
        domain: of which loader, where there are several.
        data: a JPEG or PNG file of what the network saw.
    """

    true: str
    predicted: str
    probability: float
    loss: float
    name: str = ""
    domain: str = ""
    data: bytes = field(default=b"", repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, without the picture."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "data"}


def history_curves(history: History) -> str:
    """Return the losses and the accuracies over the epochs trained, as plots that one can point at."""
    parts = []
    for word, best_of, called in (("loss", min, "lowest"), ("acc", max, "best")):
        # Training first: it then has one color in both plots.
        names = sorted(curve_names(history, word), key=lambda name: "train" not in name.lower())
        curves = {name: _points(history, name) for name in names}
        values = [y for points in curves.values() for _, y in points if y is not None and math.isfinite(y)]
        percent = word == "acc" and all(0 <= y <= 1 for y in values)
        lines = []
        for name, points in curves.items():
            finite = [y for _, y in points if y is not None and math.isfinite(y)]
            best = best_of(finite, default=math.nan)
            label = f"{name} ({called} {f'{100 * best:.1f} %' if percent else f'{best:.3g}'})"
            lines.append(Curve(label, points))
        title = {"loss": "Loss", "acc": "Accuracy"}[word]
        table = "the numbers are in the table epoch by epoch"
        parts.append(html_curves(title, lines, "epoch", percent=percent, table=table))
    shown = [part for part in parts if part]
    return f'<div class="figures">{"".join(shown)}</div>' if shown else ""


def history_table(history: History) -> str:
    """Return all metrics, an epoch a row."""
    names = [name for name in dict.fromkeys(name for record in history for name in record) if name != "epoch"]
    rows = [[_number(record.get("epoch"), ".0f"), *(_metric(record, name) for name in names)] for record in history]
    return html_table(["epoch (from 0)", *names], rows) if names else ""


def classes_heading(class_names: Sequence[str]) -> str:
    """Return what stands above the table of classes."""
    many = len(class_names) > CLASSES_SHOWN
    return f"Classes ({CLASSES_SHOWN} of {len(class_names)}, worst first)" if many else "Classes (worst first)"


def classes_table(confusion: Tensor | None, class_names: Sequence[str]) -> str:
    """Return recall and precision of the classes that there were images of, worst first.

    Args:
        confusion: counts [C, C], rows are the true classes; None: nothing.
        class_names: C names.
    """
    if confusion is None:
        return ""
    counts = confusion.cpu()
    images, right = counts.sum(1), counts.diagonal()
    recall = right / images.clamp_min(1)
    precision = right / counts.sum(0).clamp_min(1)
    mistakes = counts - counts.diagonal().diag()
    rows, shares = [], []
    for i in sorted(images.nonzero().flatten().tolist(), key=lambda i: float(recall[i]))[:CLASSES_SHOWN]:
        often, other = mistakes[i].max(0)
        taken = f"{class_names[int(other)]} ({int(often)})" if often else ""
        rows.append([class_names[i], int(images[i]), share(float(recall[i])), share(float(precision[i])), taken])
        shares.append(float(recall[i]))
    header = ["class", "test images", "recall", "precision", "mostly mistaken for"]
    return html_table(header, rows, texts=(0, 4), bars={2: shares})


def worst_images(images: Sequence[WorstImage], of: str) -> str:
    """Return the images with what they are and what they were taken for, the worst first.

    Args:
        images: as they are to be shown.
        of: of which data they are the worst, in words.
    """
    pictures = []
    for image in images:
        right = image.true == image.predicted
        said = f"{share(image.probability)} sure"
        title = f"{image.true}, and not sure of it" if right else f"{image.true}, taken for {image.predicted}"
        about = [said, f"loss {image.loss:.2f}", *filter(None, [image.domain, image.name])]
        pictures.append(
            Picture(image.data, title, ", ".join(about), f"an image of {image.true}, as the network saw it")
        )
    top = html_text(f"Those of the {of} with the highest loss, as the network saw them: scaled and cut.")
    return top + html_images(pictures) if pictures else ""


def share(value: float | None) -> str:
    """Return a share, 0 to 1, in percent; "" for None."""
    return "" if value is None else f"{100 * value:.1f} %"


def _points(history: History, name: str) -> list[tuple[float, float | None]]:
    """Return (epochs trained, value) of a metric; None where it was not finite."""
    points = [(record.get("epoch"), record[name]) for record in history if name in record]
    return [(epoch + 1, value) for epoch, value in points if epoch is not None]


def _number(value: float | None, form: str = "") -> str:
    return "" if value is None else format(value, form)


def _metric(record: Mapping[str, float | None], name: str) -> str:
    value = record.get(name)
    return "not finite" if name in record and value is None else _number(value, ".4g")
