"""What a report says of a run, found out from its Trainer and module."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections import Counter
from collections.abc import Mapping, Sequence

import lightning.pytorch as pl

from finetune_bn.callbacks.conversion import BatchNormConversion
from finetune_bn.callbacks.reload import Reload
from finetune_bn.diagnosis.training_report import DomainResult, TrainingReport
from finetune_bn.layers.sites import find_batch_norms

_PACKAGES = ("finetune-bn", "torch", "torchvision", "timm", "lightning", "torchmetrics")


def results_of(
    metrics: Mapping[str, float], domains: Sequence[str], again: Reload
) -> tuple[list[DomainResult], DomainResult]:
    """Return the result for each domain, and that over all, from what was logged and what the reloaded network did."""
    shares = {name: value for name, value in metrics.items() if "acc" in name.lower() and 0 <= value <= 1}
    # As our task names them, and as Lightning does for modules that log under one name for all loaders.
    endings = [(f"/{domain}", f"/dataloader_idx_{i}") for i, domain in enumerate(domains)]
    overall = next((value for name, value in shares.items() if not any(name.endswith(e) for e in endings)), None)
    results = []
    for i, (domain, ending) in enumerate(zip(domains, endings, strict=True)):
        found = next((value for name, value in shares.items() if name.endswith(ending)), None)
        accuracy = overall if found is None and len(domains) == 1 else found
        if again.images:
            results.append(DomainResult(domain, accuracy, again.images[i], again.accuracies[i], again.differences[i]))
        else:
            results.append(DomainResult(domain, accuracy))
    total = sum(again.images)
    if not total:
        return results, DomainResult("all", overall)
    right = sum(n * accuracy for n, accuracy in zip(again.images, again.accuracies, strict=True))
    return results, DomainResult("all", overall, total, right / total, max(again.differences))


def other_accuracies(results: Sequence[DomainResult]) -> list[str]:
    """Return a complaint where equal logits lead to another accuracy than the one that was logged."""
    off = [
        f"{result.domain} {100 * result.reloaded:.1f} % against {100 * result.accuracy:.1f} %"
        for result in results
        if result.accuracy is not None and result.reloaded is not None and result.images
        # One image may fall to the other side by rounding; whole points do not.
        if abs(result.reloaded - result.accuracy) * result.images > max(1.5, 0.005 * result.images)
    ]
    why = "its logits are the same, so what was logged is no share of right answers over all images and processes"
    return [f"its accuracy is not the one that was logged ({', '.join(off)}); {why}"] if off else []


def class_names(trainer: pl.Trainer, pl_module: pl.LightningModule, classes: int) -> list[str]:
    """Look up one name for each class: the module's, the data module's, or their numbers."""
    holders = (pl_module, getattr(trainer, "datamodule", None))
    given = [list(getattr(holder, "class_names", None) or []) for holder in holders]
    return [str(name) for name in next((names for names in given if len(names) == classes), range(classes))]


def batch_norm(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
    """Return what happened to the BatchNorm layers, or, where this package did nothing, which there are."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BatchNormConversion) and callback.plan is not None:
            return str(callback.plan).splitlines()[0].partition(": ")[2]
    kinds = Counter(site.kind for site in find_batch_norms(pl_module, group_norms=True))
    return ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common()) or "no such layer"


def not_finite(history: Sequence[Mapping[str, float | None]]) -> list[str]:
    """Return a sentence for each metric that was not finite in some epoch."""
    epochs: dict[str, list[str]] = {}
    for record in history:
        for name, value in record.items():
            if value is None:
                epochs.setdefault(name, []).append(f"{record['epoch']}")
    return [f"{name}, not finite in epoch {', '.join(numbers)}." for name, numbers in epochs.items()]


def versions() -> dict[str, str]:
    """Return the versions of the software in use."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        if importlib.util.find_spec(package.replace("-", "_")) is not None:
            found[package] = importlib.metadata.version(package)
    return found


def print_results(report: TrainingReport) -> None:
    """Print the table of test results, each figure once, other test metrics, and what went wrong."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    header, rows = report.rows()
    table = Table(title="Test accuracy of a run that diverged" if report.diverged else "Test accuracy")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    console.print(table)
    others = {name: value for name, value in report.test_metrics.items() if "acc" not in name.lower()}
    if len(report.results) > 1 and others:  # else Lightning has printed them
        console.print(", ".join(f"{name} {value:.4g}" for name, value in others.items()), markup=False)
    for problem in [*filter(None, [report.diverged]), *report.errors]:
        console.print(problem, style="bold red", markup=False)
