"""What a diagnosis is as data: findings in words, a row for each layer, the batches, the curvature, the memory."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from finetune_bn.diagnosis.diagnosis_page import diagnosis_page
from finetune_bn.utilities.files import write_atomically
from finetune_bn.utilities.layer_figure import layer_figure
from finetune_bn.utilities.results import Result, Shown

Level = Literal["ok", "note", "warning", "problem"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and what came of it.

    Attributes:
        name: a word or two for it, the same in every diagnosis.
        level: `ok`; `note`: to know; `warning`: it costs accuracy; `problem`: training would fail or mislead.
        sentence: what was found, with its number.
        figure: the number; None where there is none.
        remedy: what to do about it; empty where nothing is to be done.
    """

    name: str
    level: Level
    sentence: str
    figure: float | None = None
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.level:7}  {self.name}: {self.sentence}{f' {self.remedy}' if self.remedy else ''}"


@dataclass(frozen=True)
class LayerDiagnosis:
    """One BatchNorm layer, live or frozen; None: cannot be told.

    Attributes:
        names: all its names in the model.
        kind: class name.
        channels: number of channels.
        by_batch: whether in training it normalizes all images of a batch together.
        shift_mean: |mean of the data - stored mean| / stored standard deviation, averaged over channels.
        log_var_ratio: logarithm of the ratio of the data's variance and the stored one, averaged over channels.
        log_var: the absolute value of that logarithm, averaged over channels.
        rho: share of the variance of images' channel means that lies between labels.
        deff: design effect of the batches.
        n_eff: how many independent images a batch is worth.
        running_var_bias: how far off the running variance would settle in training, relative to that of the data.
        leakage: how far an image's output moves when the other images of its batch are exchanged.
        values_per_channel: values that it would normalize together in training: images of a device times positions.
        dead: channels that have next to no variance in these data.
        not_finite: channels that NaN or infinite values reach.
    """

    names: tuple[str, ...]
    kind: str
    channels: int
    by_batch: bool
    shift_mean: float | None = None
    log_var_ratio: float | None = None
    log_var: float | None = None
    rho: float | None = None
    deff: float | None = None
    n_eff: float | None = None
    running_var_bias: float | None = None
    leakage: float | None = None
    values_per_channel: int | None = None
    dead: int = 0
    not_finite: int = 0

    @property
    def name(self) -> str:
        """Its names in one word, as a table shows them."""
        return " = ".join(name or "(root)" for name in self.names)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self) | {"names": list(self.names)}


@dataclass(frozen=True)
class BatchDiagnosis:
    """The batches, as they come from the loader; None: cannot be told.

    Attributes:
        batch_size: images of a batch on one device; the median of those looked at.
        devices: devices that train together.
        synced: whether BatchNorm normalizes over all of them.
        accumulate: batches whose gradients make one step.
        batches: how many were looked at.
        labels: how many different labels were seen.
        images_per_label: images of a label in a batch, where it is there at all; on average.
        p_value: how likely images dealt out at random would be as alike within batches as these, by their channel
            means (permutation test).
        label_p_value: how likely labels dealt out at random would meet in batches as often as these.
        iid: whether the batches look like independent draws.
        deff: median over layers of the design effect.
        n_eff: median over layers of how many independent images a batch is worth.
        train_eval_gap: distance between the outputs in training and eval mode, relative to that between two images.
        leakage: how far the output of an image moves when the others of its batch are exchanged, in the same unit.
        single_value_layers: names of the layers that would get one value a channel, or none, in training.
    """

    batch_size: int
    devices: int = 1
    synced: bool = False
    accumulate: int = 1
    batches: int = 0
    labels: int | None = None
    images_per_label: float | None = None
    p_value: float | None = None
    label_p_value: float | None = None
    iid: bool | None = None
    deff: float | None = None
    n_eff: float | None = None
    train_eval_gap: float | None = None
    leakage: float | None = None
    single_value_layers: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self) | {"single_value_layers": list(self.single_value_layers)}


@dataclass(frozen=True)
class Curvature:
    """The largest eigenvalue of the loss's Hessian, the layers live and frozen; None: not measured.

    Attributes:
        live: by the statistics of the batch.
        frozen: by the stored statistics, gamma and beta constant.
        images: images of the batch whose loss it is.
        optimizer: whose steps the bounds are about, in words.
        lr: the learning rate that was asked about.
        lr_bound_live: where steps begin to diverge in the steepest direction, the layers live.
        lr_bound_frozen: the same, the layers frozen.
        proposed: a learning rate for frozen layers.
    """

    live: float | None = None
    frozen: float | None = None
    images: int = 0
    optimizer: str = "gradient descent"
    lr: float | None = None
    lr_bound_live: float | None = None
    lr_bound_frozen: float | None = None
    proposed: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as curved the loss is with frozen layers."""
        return self.frozen / self.live if self.frozen is not None and self.live else None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class PolicyMemory:
    """What one training step takes under a policy.

    Attributes:
        policy: the policy in words.
        bytes_per_image: bytes that are kept for the backward pass, for each image of a batch.
        launches: operators that a training step launches, forward and backward, without the optimizer.
        largest_batch: the largest batch of a device that fits, by its memory in GiB; None where that was not asked for.
    """

    policy: str
    bytes_per_image: int
    launches: int | None = None
    largest_batch: tuple[tuple[float, int], ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        fits = None if self.largest_batch is None else [list(pair) for pair in self.largest_batch]
        return asdict(self) | {"largest_batch": fits}


@dataclass(frozen=True)
class Diagnosis(Result):
    """What `diagnose` found; `print` it, look at it in a notebook, or store it.

    Attributes:
        model: class name of the model.
        family: name of its architecture, where the model knows it; else the class name.
        images: images looked at.
        classes: number of different labels among them; None where batches hold no labels.
        train_images: images of the training set; None where the loader does not tell.
        policy: under which policy training is planned, in words; None: as the model is.
        findings: what was found, the worst first.
        layers: one row a BatchNorm layer, in the order of definition.
        batches: the batches.
        curvature: of the loss; None where it was not measured.
        memory: one row a policy; empty where it was not measured.
        left_out: what was not measured, and why, a sentence each.
        seconds: how long it took.
    """

    model: str
    family: str
    images: int
    classes: int | None
    train_images: int | None
    policy: str | None
    findings: tuple[Finding, ...]
    layers: tuple[LayerDiagnosis, ...]
    batches: BatchDiagnosis
    curvature: Curvature | None = None
    memory: tuple[PolicyMemory, ...] = ()
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def shift(self) -> float | None:
        """How far the data are from the stored statistics: the median over layers of `shift_mean`."""
        return _median(layer.shift_mean for layer in self.layers)

    @property
    def log_var(self) -> float | None:
        """How far the variances are: the median over layers of `log_var`."""
        return _median(layer.log_var for layer in self.layers)

    @property
    def worst(self) -> Level:
        """The level of the worst finding."""
        return max((finding.level for finding in self.findings), key=LEVELS.index, default="ok")

    def finding(self, name: str) -> Finding | None:
        """Return the finding of a name, if there is one."""
        return next((finding for finding in self.findings if finding.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data; docs/api has its schema."""
        return {
            "model": self.model,
            "family": self.family,
            "images": self.images,
            "classes": self.classes,
            "train_images": self.train_images,
            "policy": self.policy,
            "shift": self.shift,
            "log_var": self.log_var,
            "worst": self.worst,
            "findings": [finding.to_dict() for finding in self.findings],
            "batches": self.batches.to_dict(),
            "curvature": None if self.curvature is None else self.curvature.to_dict(),
            "memory": [row.to_dict() for row in self.memory],
            "layers": [layer.to_dict() for layer in self.layers],
            "left_out": list(self.left_out),
            "seconds": self.seconds,
        }

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return header and cells of the table of layers."""
        header = ["layer", "type", "shift (sd)", "log var", "DEFF", "n_eff", "bias of var", "leakage", "values"]
        cells = [
            [
                layer.name,
                layer.kind,
                _shown(layer.shift_mean),
                _shown(layer.log_var_ratio, "+.2f"),
                _shown(layer.deff),
                _shown(layer.n_eff, ".1f"),
                _shown(layer.running_var_bias, "+.1%"),
                _shown(layer.leakage),
                "-" if layer.values_per_channel is None else f"{layer.values_per_channel:,}",
            ]
            for layer in self.layers
        ]
        return header, cells

    def memory_rows(self) -> tuple[list[str], list[list[str]]]:
        """Return header and cells of the table of policies."""
        sizes = sorted({gib for row in self.memory for gib, _ in row.largest_batch or ()})
        cells = []
        for row in self.memory:
            fits = dict(row.largest_batch or ())
            launches = "-" if row.launches is None else f"{row.launches:,}"
            largest = [f"{fits[gib]:,}" if gib in fits else "-" for gib in sizes]
            cells.append([row.policy, f"{row.bytes_per_image / 2**20:.2f}", launches, *largest])
        return ["policy", "MiB an image", "launches", *(f"batch in {gib:g} GiB" for gib in sizes)], cells

    def shown(self) -> Shown:
        """Return what was found, the layers, and what the policies take."""
        header, cells = self.rows()
        more = []
        if self.memory:
            names, rows = self.memory_rows()
            more.append(Shown("What a training step takes:", names, rows, right=range(1, len(names))))
        more += [Shown(f"left out: {reason}") for reason in self.left_out]
        return Shown(
            f"{self.family} on {self.images} images, in {self.seconds:.1f} s: {_counted(self.findings)}",
            header if cells else (),
            cells,
            right=range(2, len(header)),
            lead=[str(finding) for finding in self.findings],
            more=more,
        )

    def plot(self) -> Any:
        """Return a matplotlib figure: shift and worth of a batch, layer by layer."""
        panels = {
            "shift of the mean (source sd)": {"shift": [layer.shift_mean for layer in self.layers]},
            "independent images of a batch": {"n_eff": [layer.n_eff for layer in self.layers]},
        }
        title = f"{self.family} on {self.images} images"
        return layer_figure(title, [layer.name for layer in self.layers], panels)

    def save_html(self, path: str | Path) -> None:
        """Write one page that opens from disk and asks for nothing else: findings, layers, batches, memory.

        Args:
            path: the file.

        Raises:
            OSError: it cannot be written.
        """
        write_atomically(path, diagnosis_page(self.to_dict()))


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return median(known) if known else None


def _shown(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _counted(findings: tuple[Finding, ...]) -> str:
    counts = {level: sum(f.level == level for f in findings) for level in reversed(LEVELS)}
    words = [f"{n} {level}{'s' if n > 1 and level != 'ok' else ''}" for level, n in counts.items() if n]
    return ", ".join(words) or "nothing found"
