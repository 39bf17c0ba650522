"""Report a fine-tuning: its curves, its test, and the test again after the checkpoint is loaded into plain timm."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from finetune_bn.callbacks.conversion import BatchNormConversion
from finetune_bn.callbacks.module import loader_names
from finetune_bn.callbacks.reload import Reload, reload_and_test, timm_net
from finetune_bn.diagnosis.loading_code import timm_code
from finetune_bn.diagnosis.training_report import DomainResult, TrainingReport
from finetune_bn.errors import FinetuneBNError, MissingDependency, complaint
from finetune_bn.layers.sites import find_batch_norms

_PACKAGES = ("finetune-bn", "torch", "torchvision", "timm", "lightning", "torchmetrics")


class FinetuneReport(Callback):
    """Write a report of the training and the test: a figure, a page for the browser, and the numbers as JSON.

    Works with any LightningModule. The curves show what it logs with `loss` or `acc` in the name, the bars its test
    accuracy on each test loader. After the test of a checkpoint of ImageClassification, or of any module that keeps a
    timm network as `net` and its name as hyperparameter `backbone`, the checkpoint is loaded into a plain timm model
    and tested again on the same images: nothing of this package is needed to use what was trained.

    Args:
        dirpath: Folder of the report. Default: the folder `report` beside the metrics of the run.
        check_reload: Test the checkpoint a second time, in plain timm. It takes about as long as the test.
    """

    def __init__(self, dirpath: str | None = None, check_reload: bool = True) -> None:
        super().__init__()
        # Here and not when there is something to draw: nobody should learn of it after hours of training.
        for package in ("matplotlib", "rich"):
            if importlib.util.find_spec(package) is None:
                remedy = f"Run: pip install {package}"
                raise MissingDependency(complaint(package, "not installed", f"{package}, for FinetuneReport", remedy))
        if dirpath is not None and Path(dirpath).exists() and not Path(dirpath).is_dir():
            raise FinetuneBNError(complaint("dirpath", dirpath, "a folder, there already or to be made"))
        self.dirpath = dirpath
        self.check_reload = check_reload
        self.history: list[dict[str, float | None]] = []
        self.path: Path | None = None
        self._folder = Path()
        self._epoch: int | None = None
        self._seen: dict[str, Tensor] = {}
        self._news: TrainingReport | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning wants all processes to ask for log_dir.
        log_dir = trainer.log_dir or trainer.default_root_dir
        self._folder = Path(log_dir, "report") if self.dirpath is None else Path(self.dirpath)
        self._news = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Only now is it known where a resumed training goes on.
        self.history = [record for record in self.history if (record["epoch"] or 0) < trainer.current_epoch]
        progress: Any = trainer.fit_loop.epoch_progress.current
        amid = trainer.fit_loop.restarted_mid_epoch and progress.processed < progress.ready
        self._epoch, self._seen = trainer.current_epoch if amid else None, {}

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The module's own on_train_epoch_end came after ours: what it logged there belongs to the last epoch.
        self._record(trainer)
        self._epoch = trainer.current_epoch

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
            report = self._describe(trainer, pl_module, best)
            self._write(replace(report, notes=[*report.notes, "The test: none was run since the training."]))

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        domains = loader_names(trainer, len(tree_leaves(trainer.test_dataloaders)), alone="all")
        # In all processes: a metric over several of them, as the confusion matrix may be, is computed by all.
        confusion: Any = getattr(pl_module, "test_confusion", None)
        confusion = confusion.compute() if callable(getattr(confusion, "compute", None)) else confusion
        again = Reload(left_out="check_reload is false")
        if self.check_reload:
            rank_zero_info("FinetuneReport: the checkpoint is tested once more, in plain timm.")
            again = reload_and_test(trainer, pl_module, domains)
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        results, overall = _results(metrics, domains, again)
        report = self._describe(trainer, pl_module, trainer.ckpt_path)
        notes = list(report.notes)
        problems = [again.problem] if again.problem else _other_accuracies(results)
        errors = [f"The checkpoint in plain timm: {problem}." for problem in problems]
        if again.left_out:
            notes.append(f"The test of the checkpoint in plain timm: {again.left_out}.")
        if not torch.is_tensor(confusion):
            notes.append(f"The confusion matrix: {type(pl_module).__name__} has no `test_confusion` after its test.")
            confusion = None
        if all(result.accuracy is None for result in (*results, overall)):
            notes.append("The test accuracy: no share from 0 to 1 was logged under a name with `acc` in it.")
        for error in errors:
            rank_zero_warn(f"FinetuneReport: {error}")
        self._write(
            replace(
                report,
                results=results,
                overall=overall if len(results) > 1 else None,
                test_metrics=metrics,
                confusion=confusion,
                class_names=[] if confusion is None else _class_names(trainer, pl_module, len(confusion)),
                tolerance=again.tolerance,
                errors=errors,
                notes=notes,
            )
        )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Here, because Lightning prints its own table of results after `on_test_end`.
        if self._news is None or self.path is None:
            return
        if isinstance(trainer.progress_bar_callback, RichProgressBar):
            # Its turn to end comes after ours, and it would print its last line below ours.
            trainer.progress_bar_callback.teardown(trainer, pl_module, stage)
        if self._news.results:
            _print_results(self._news)
        path = self.path.resolve()
        print(f"Report: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}", flush=True)
        self._news = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        loaded = state_dict["history"]
        # The best checkpoint, tested after the training, knows the first epochs only of what is known here.
        shorter = len(loaded) <= len(self.history)
        same = all(old.items() <= new.items() for old, new in zip(loaded, self.history, strict=False))
        if not (shorter and same):
            self.history = loaded

    def _record(self, trainer: pl.Trainer) -> None:
        """Add to the record of the epoch what was logged since the last call."""
        if self._epoch is None:
            return
        metrics = trainer.callback_metrics
        # What an epoch did not log is there with its last value: it is then the same tensor object.
        fresh = {name: value for name, value in metrics.items() if self._seen.get(name) is not value}
        self._seen = dict(metrics)
        if not self.history or self.history[-1]["epoch"] != self._epoch:
            self.history.append({"epoch": self._epoch})
        for name, value in fresh.items():
            base = name.removesuffix("_step").removesuffix("_epoch")
            if base == name or base not in metrics:
                number = float(value)
                self.history[-1][name] = number if math.isfinite(number) else None

    def _describe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> TrainingReport:
        """Return the report without the test; `checkpoint` is the path of a file, or None."""
        recipe = timm_net(pl_module)
        datamodule = getattr(trainer, "datamodule", None)
        layers = _batch_norm(trainer, pl_module)
        facts = {
            "classes": recipe.num_classes if recipe else None,
            "epochs": len(self.history) or None,
            "images a batch": getattr(datamodule, "batch_size", None),
        }
        lr = pl_module.hparams.get("lr")
        how = [f"BatchNorm: {layers}", *(f"{value} {what}" for what, value in facts.items() if value is not None)]
        relative = None if checkpoint is None else Path(os.path.relpath(checkpoint, self._folder)).as_posix()
        what = f"{recipe.name if recipe else type(pl_module).__name__} {'fine-tuned' if self.history else 'tested'}"
        return TrainingReport(
            title=what if datamodule is None else f"{what} on {type(datamodule).__name__}",
            subtitle=" · ".join(how + ([] if lr is None else [f"learning rate {lr:g}"])),
            batch_norm=layers,
            history=self.history,
            checkpoint=relative,
            loading_code=timm_code(*recipe[:2], relative, recipe.arguments) if recipe and relative else "",
            notes=_not_finite(self.history),
            versions=_versions(),
        )

    def _write(self, report: TrainingReport) -> None:
        self.path = report.write(self._folder)
        self._news = report


def _results(
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


def _other_accuracies(results: Sequence[DomainResult]) -> list[str]:
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


def _class_names(trainer: pl.Trainer, pl_module: pl.LightningModule, classes: int) -> list[str]:
    holders = (pl_module, getattr(trainer, "datamodule", None))
    given = [list(getattr(holder, "class_names", None) or []) for holder in holders]
    return [str(name) for name in next((names for names in given if len(names) == classes), range(classes))]


def _batch_norm(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
    """Return what happened to the BatchNorm layers, or, where this package did nothing, which there are."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BatchNormConversion) and callback.plan is not None:
            return str(callback.plan).splitlines()[0].partition(": ")[2]
    kinds = Counter(site.kind for site in find_batch_norms(pl_module, group_norms=True))
    return ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common()) or "no such layer"


def _not_finite(history: Sequence[Mapping[str, float | None]]) -> list[str]:
    epochs: dict[str, list[str]] = {}
    for record in history:
        for name, value in record.items():
            if value is None:
                epochs.setdefault(name, []).append(f"{record['epoch']}")
    return [f"{name}, not finite in epoch {', '.join(numbers)}." for name, numbers in epochs.items()]


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        if importlib.util.find_spec(package.replace("-", "_")) is not None:
            found[package] = importlib.metadata.version(package)
    return found


def _print_results(report: TrainingReport) -> None:
    from rich.console import Console
    from rich.table import Table

    header, rows = report.rows()
    table = Table(title="Test accuracy")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    for problem in report.errors:
        Console().print(problem, style="bold red", markup=False)
