"""What fitting GroupNorm layers to images did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_bn.utilities.layer_figure import layer_figure
from finetune_bn.utilities.results import Result, Shown


@dataclass(frozen=True)
class LayerFit:
    """One layer before and after.

    Attributes:
        names: all names of the layer in the model.
        num_features: number of channels C.
        groups_before: number of groups before.
        groups: number of groups now.
        eps_before: what was added to variances before.
        eps: what is added to them now.
        contrast: share of an image's contrast that passes now, eps / (variance + eps) with the variance that the
            running statistics predict: 0 where all of it is normalized, 1 where nothing is and the layer subtracts a
            mean. None without running statistics.
        error_before: what the layer's output would be off by without its fit, the layers before it fitted: root mean
            square of the difference to the output of its BatchNorm in the BatchNorm network, relative to the standard
            deviation of that.
        error: the same now.
        not_balanced: why the channels of the map in front were not balanced for it; "" where they were.
    """

    names: tuple[str, ...]
    num_features: int
    groups_before: int
    groups: int
    eps_before: float
    eps: float
    contrast: float | None
    error_before: float
    error: float
    not_balanced: str


@dataclass(frozen=True)
class Calibration(Result):
    """What `calibrate_group_norm` did; `print` it for a table.

    Attributes:
        images: images of all processes that were used.
        rows: one a layer, in the order in which the images reach them.
        left_alone: names of converted layers that no image reached.
    """

    images: int
    rows: tuple[LayerFit, ...]
    left_alone: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data, for JSON."""
        rows = [{**vars(row), "names": list(row.names)} for row in self.rows]
        return {"images": self.images, "rows": rows, "left_alone": list(self.left_alone)}

    def shown(self) -> Shown:
        """Return how well the layers fit now, in total and layer by layer."""
        header = ("layer", "C", "groups", "eps", "contrast kept", "error before", "error now")
        body = [
            (
                " = ".join(name or "(root)" for name in row.names),
                str(row.num_features),
                str(row.groups) if row.groups == row.groups_before else f"{row.groups_before} -> {row.groups}",
                f"{row.eps:.2g}" if row.eps == row.eps_before else f"{row.eps_before:.2g} -> {row.eps:.2g}",
                "" if row.contrast is None else f"{100 * row.contrast:.0f} %",
                f"{row.error_before:.3f}",
                f"{row.error:.3f}",
            )
            for row in self.rows
        ]
        last = f"; behind the last, {self.rows[-1].error:.3f}" if self.rows else ""
        title = (
            f"{len(self.rows)} GroupNorm layers fitted to {self.images} images: errors in standard deviations of the "
            f"BatchNorm's output{last}"
        )
        reasons: dict[str, list[str]] = {}
        for row in self.rows:
            if row.not_balanced:
                reasons.setdefault(row.not_balanced, []).append(row.names[0] or "(root)")
        unbalanced = [f"not balanced: {', '.join(names)}: {why}" for why, names in reasons.items()]
        alone = [f"left alone: {name or '(root)'} was not reached by the images" for name in self.left_alone]
        return Shown(title, header, body, [*self._not_normalizing(), *unbalanced, *alone])

    def _not_normalizing(self) -> list[str]:
        """Return a sentence on layers that let pass more than half of an image's contrast, where there are some."""
        named = [row.names[0] or "(root)" for row in self.rows if row.contrast is not None and row.contrast > 0.501]
        if not named:
            return []
        shown = ", ".join(named[:3]) + (", ..." if len(named) > 3 else "")
        return [
            f"hardly normalizing: {len(named)} of {len(self.rows)} layers ({shown}) let pass more than half of an "
            'image\'s contrast, and mainly subtract its mean; ToGroupNorm(eps="normalize") or "own" asks for more'
        ]

    def plot(self) -> Any:
        """Return a matplotlib figure: the error of each layer before and now."""
        names = [row.names[0] for row in self.rows]
        errors = {"before": [row.error_before for row in self.rows], "now": [row.error for row in self.rows]}
        title = f"GroupNorm layers fitted to {self.images} images"
        return layer_figure(title, names, {"error (sd of the BatchNorm's output)": errors})
