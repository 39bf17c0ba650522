"""What is reported of one fine-tuning: its figure, its page and its data, made from plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune_bn.diagnosis.figures import History
from finetune_bn.diagnosis.loading_code import use_code
from finetune_bn.diagnosis.page import (
    html_code,
    html_figures,
    html_list,
    html_page,
    html_table,
    html_text,
    html_verdict,
)
from finetune_bn.diagnosis.status import Status
from finetune_bn.diagnosis.training_figures import Drawn, panels, slide
from finetune_bn.diagnosis.training_page import (
    WorstImage,
    classes_heading,
    classes_table,
    history_curves,
    history_table,
    share,
    worst_images,
)
from finetune_bn.utilities.files import to_json, write_atomically
from finetune_bn.utilities.rendering import png


@dataclass(frozen=True)
class DomainResult:
    """The test on the images of one domain, or on all of them.

    Attributes:
        domain: its name.
        accuracy: share of right answers of the trained module, 0 to 1.
        images: how many images the reloaded network was tested on.
        reloaded: share of right answers of a plain timm model with the weights of the checkpoint.
        difference: largest |difference| of the two networks' logits on one batch, relative to the largest |logit|.
    """

    domain: str
    accuracy: float | None = None
    images: int | None = None
    reloaded: float | None = None
    difference: float | None = None


@dataclass(frozen=True)
class TrainingReport:
    """A fine-tuning as data.

    Attributes:
        title: what was trained on what.
        subtitle: how.
        batch_norm: what happened to the BatchNorm layers, one line.
        layers: the status of the network when the training began; None where none was seen.
        history: the metrics of each epoch.
        results: the test, domain by domain; empty without a test.
        overall: the test over all domains.
        test_metrics: all that was logged in the test.
        confusion: counts [C, C], rows are the true classes.
        class_names: C names.
        checkpoint: the file that was tested, relative to the report.
        loading_code: Python that loads it into plain timm.
        model_file: the file that `finetune_bn.load` takes, relative to the report.
        worst: the images that the network is most wrong of, the worst first.
        worst_of: of which data, in words.
        tolerance: what `DomainResult.difference` may be.
        errors: what went wrong.
        notes: what was left out, and why.
        versions: of the software.
    """

    title: str
    subtitle: str = ""
    batch_norm: str = ""
    layers: Status | None = None
    history: History = ()
    results: Sequence[DomainResult] = ()
    overall: DomainResult | None = None
    test_metrics: Mapping[str, float] = field(default_factory=dict)
    confusion: Tensor | None = None
    class_names: Sequence[str] = ()
    checkpoint: str | None = None
    loading_code: str = ""
    model_file: str | None = None
    worst: Sequence[WorstImage] = ()
    worst_of: str = "test images"
    tolerance: float | None = None
    errors: Sequence[str] = ()
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write `report.png`, `report.json` and `report.html` (which needs no other), and return the page's path."""
        write_atomically(folder / "report.png", png(self.figure()))
        write_atomically(folder / "report.json", to_json(self.to_dict()))
        write_atomically(folder / "report.html", self.page())
        return folder / "report.html"

    @property
    def diverged(self) -> str:
        """What was not finite at the end of the run, a sentence; "" for a run that did not diverge."""
        last: dict[str, tuple[Any, float | None]] = {}
        for record in self.history:
            last |= {name: (record.get("epoch"), value) for name, value in record.items() if "loss" in name.lower()}
        names = [f"{name} in epoch {epoch}" for name, (epoch, value) in last.items() if value is None]
        lost = {name: value for name, value in self.test_metrics.items() if "loss" in name.lower()}
        names += [name for name, value in lost.items() if not math.isfinite(value)]
        return f"The run diverged: not finite were {', '.join(names)}." if names else ""

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data, but for the confusion matrix, a tensor."""
        return (
            {"diverged": self.diverged}
            | {name: getattr(self, name) for name in self.__dataclass_fields__}
            | {
                "results": [asdict(result) for result in self.results],
                "overall": None if self.overall is None else asdict(self.overall),
                "layers": None if self.layers is None else self.layers.to_dict(),
                "worst": [image.to_dict() for image in self.worst],
            }
        )

    def figure(self) -> Any:
        """Return a `matplotlib.figure.Figure` for a slide, with those panels for which there is something to draw."""
        title = f"DIVERGED: {self.title}" if self.diverged else self.title
        return slide(title, self.subtitle, self._drawn())

    def page(self) -> str:
        """Return the HTML page, with the figures in it."""
        paths = html_text("Paths are those from the folder of this page.")
        return html_page(
            self.title,
            [
                ("", self._verdict()),
                ("Wrong", html_list([*filter(None, [self.diverged]), *self.errors], "error")),
                ("Test accuracy", self._results_table()),
                ("Training", history_curves(self.history)),
                ("Worst images", worst_images(self.worst, self.worst_of)),
                ("", html_figures(panels(self._drawn()))),
                ("BatchNorm layers", self._layers()),
                ("Use it", html_code(use_code(self.model_file)) + paths if self.model_file else ""),
                ("Load it into plain timm", html_code(self.loading_code) + paths if self.loading_code else ""),
                (classes_heading(self.class_names), classes_table(self.confusion, self.class_names)),
                ("Epoch by epoch", history_table(self.history)),
                ("All test metrics", html_table(["metric", "value"], _cells(self.test_metrics.items()))),
                ("Left out", html_list(self.notes)),
                ("Versions", html_text(", ".join(f"{name} {version}" for name, version in self.versions.items()))),
            ],
            self.subtitle,
        )

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return header and cells of the table of test results; columns in which nothing is known are left out."""
        results = [*self.results, *([] if self.overall is None else [self.overall])]
        columns = {
            "domain": [result.domain for result in results],
            "images": [_text(result.images) for result in results],
            "accuracy": [share(result.accuracy) for result in results],
            "in plain timm": [share(result.reloaded) for result in results],
            "logits differ by": [_text(result.difference, ".1e" if result.difference else "g") for result in results],
        }
        shown = {name: cells for name, cells in columns.items() if any(cells)}
        return list(shown), [list(cells) for cells in zip(*shown.values(), strict=True)]

    def _drawn(self) -> Drawn:
        accuracies = {result.domain: result.accuracy for result in self.results if result.accuracy is not None}
        overall = None if self.overall is None else self.overall.accuracy
        return Drawn(self.history, accuracies, overall, self.confusion, self.class_names)

    def _verdict(self) -> str:
        overall = self.overall or (self.results[0] if len(self.results) == 1 else None)
        accuracy = None if overall is None else overall.accuracy
        tested = "" if accuracy is None else f"{share(accuracy)} of the test images right"
        if self.diverged:
            after = f"; {tested}, by a network that is of no use" if tested else ""
            return html_verdict("Diverged", f"not a result{after}", "bad")
        kind = "bad" if self.errors else "good"
        recall = self.test_metrics.get("test_recall_at_1")
        if accuracy is None and recall is not None and math.isfinite(recall):
            return html_verdict(share(recall), "of the test images have one of their label as the nearest", kind)
        if accuracy is None or overall is None:
            return ""
        of = f"of {overall.images:,} test images right" if overall.images else "of the test images right"
        return html_verdict(share(accuracy), of, kind)

    def _layers(self) -> str:
        line = html_text(self.batch_norm) if self.batch_norm else ""
        if self.layers is None:
            return line
        numbers = (
            f"When the training began, {self.layers.trained_norm:,} numbers of normalization layers and "
            f"{self.layers.trained_other:,} others were trained; {self.layers.constant:,} were constant."
        )
        problems = [f"{', '.join(names)}: {problem}" for problem, names in self.layers.irregular.items()]
        table = html_table(*self.layers.rows(), texts=(1, 2, 3, 5))
        return line + table + html_text(numbers) + html_list(problems, "error")

    def _results_table(self) -> str:
        header, rows = self.rows()
        everything = [*self.results, *([] if self.overall is None else [self.overall])]
        bars = {header.index("accuracy"): [r.accuracy for r in everything]} if "accuracy" in header else {}
        table = html_table(header, rows, bars=bars) if self.results else ""
        if self.tolerance is None or not table:
            return table
        return table + html_text(
            "In plain timm: the checkpoint loaded into a timm model with ordinary BatchNorm layers, on the same images."
            " The largest difference between its logits and those of the trained network, on one batch a domain, is"
            f" relative to the largest logit; up to {self.tolerance:.0e} is rounding."
        )


def _text(value: float | None, form: str = "") -> str:
    return "" if value is None else format(value, form)


def _cells(items: Iterable[tuple[str, float]]) -> list[list[str]]:
    return [[name, f"{value:.4g}"] for name, value in items]
