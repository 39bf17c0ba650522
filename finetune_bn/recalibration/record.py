"""What a recalibration found, as data: one row a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from finetune_bn.utilities.layer_figure import layer_figure
from finetune_bn.utilities.results import Result, Shown


@dataclass(frozen=True)
class LayerRecord:
    """One layer before and after.

    Attributes:
        names: all names of the layer in the model.
        kind: class name of the layer.
        values: values of a channel that were measured (images times positions).
        mean_before: running mean before, [C], float32 or higher, on the CPU; and so the other three.
        var_before: running variance before.
        mean_after: running mean now.
        var_after: running variance now.
        eps: what the layer adds to the variance. What follows is in units of sqrt(var + eps), by which it divides, so
            that channels which hardly vary do not rule the figures.
        standard_error: of what was measured, from how images differ: of the mean in those units, of the variance
            relative to var + eps; the larger of the two root mean squares over channels. NaN with one image.
    """

    names: tuple[str, ...]
    kind: str
    values: int
    mean_before: Tensor = field(repr=False)
    var_before: Tensor = field(repr=False)
    mean_after: Tensor = field(repr=False)
    var_after: Tensor = field(repr=False)
    eps: float
    standard_error: float

    @property
    def shift(self) -> float:
        """How far the means moved, in units of sqrt(var + eps) of before; root mean square over channels."""
        sd = (self.var_before.double() + self.eps).sqrt()
        return float(((self.mean_after.double() - self.mean_before.double()) / sd).square().mean().sqrt())

    @property
    def var_ratio(self) -> float:
        """(Variance after + eps) / (variance before + eps); geometric mean over channels."""
        ratio = (self.var_after.double() + self.eps) / (self.var_before.double() + self.eps)
        return float(ratio.log().mean().exp())

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data, without the statistics themselves; None stands for NaN."""
        figures = {name: getattr(self, name) for name in ("kind", "values", "shift", "var_ratio")}
        return {"names": list(self.names), **figures, "standard_error": _known(self.standard_error)}


@dataclass(frozen=True)
class Recalibration(Result):
    """What `recalibrate` did; `print` it for a table.

    Attributes:
        mode: `exact` or `one_pass`, as it was run in the end.
        how: `renormalize` or `preserve`.
        images: images of all processes that were measured.
        rows: one a layer that was recalibrated, in the order in which the data reach them.
        left_alone: (layer, reason) of every BatchNorm layer that was not.
        warnings: what a user should know of the data.
    """

    mode: str
    how: str
    images: int
    rows: tuple[LayerRecord, ...]
    left_alone: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]

    @property
    def standard_error(self) -> float:
        """The largest standard error of a layer; NaN where that of one is not known."""
        errors = [row.standard_error for row in self.rows]
        return math.nan if any(map(math.isnan, errors)) else max(errors, default=math.nan)

    @property
    def shift(self) -> float:
        """How far the means moved, in standard deviations of before; root mean square over layers."""
        squares = [row.shift**2 for row in self.rows]
        return float((sum(squares) / max(len(squares), 1)) ** 0.5)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data, for JSON: None stands for NaN."""
        return {
            "mode": self.mode,
            "how": self.how,
            "images": self.images,
            "standard_error": _known(self.standard_error),
            "shift": self.shift,
            "rows": [row.to_dict() for row in self.rows],
            "left_alone": [list(pair) for pair in self.left_alone],
            "warnings": list(self.warnings),
        }

    def shown(self) -> Shown:
        """Return how far the statistics moved, in total and layer by layer."""
        header = ("layer", "type", "values", "mean moved by (sd)", "variance x", "standard error")
        body = [
            (
                " = ".join(name or "(root)" for name in row.names),
                row.kind,
                str(row.values),
                f"{row.shift:.3f}",
                f"{row.var_ratio:.3f}",
                f"{row.standard_error:.4f}",
            )
            for row in self.rows
        ]
        title = (
            f"{len(self.rows)} BatchNorm layers recalibrated on {self.images} images "
            f"(mode {self.mode}, {self.how}): means moved by {self.shift:.3f} sd, "
            f"standard error at most {self.standard_error:.4f}"
        )
        alone = [f"left alone: {name or '(root)'} {reason}" for name, reason in self.left_alone]
        noted = [f"note: {warning}" for warning in self.warnings]
        return Shown(title, header, body, [*alone, *noted])

    def plot(self) -> Any:
        """Return a matplotlib figure: how far the means of each layer moved, with standard errors."""
        names = [row.names[0] for row in self.rows]
        shifts = {"mean moved by": [row.shift for row in self.rows]}
        errors = [row.standard_error for row in self.rows]
        title = f"Recalibrated on {self.images} images"
        return layer_figure(title, names, {"mean moved by (sd of before)": shifts}, errors=errors)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
