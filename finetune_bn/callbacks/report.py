"""Report a fine-tuning: its curves, its test, and the test again after the checkpoint is loaded into plain timm."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from finetune_bn.backbones import create_backbone
from finetune_bn.callbacks.conversion import BatchNormConversion
from finetune_bn.errors import FinetuneBNError, MissingDependency, complaint
from finetune_bn.functional import TOLERANCE
from finetune_bn.probe import distance, quietly
from finetune_bn.sites import find_batch_norms
from finetune_bn.training_report import DomainResult, TrainingReport, timm_code

_PACKAGES = ("finetune-bn", "torch", "torchvision", "timm", "lightning", "torchmetrics")


class FinetuneReport(Callback):
    """Write a report of the training and the test: a figure, a page to look at in a browser, and the numbers as JSON.

    Works with any LightningModule. The curves show what it logs with `loss` or `acc` in the name, the bars its test
    accuracy for each test loader. After a test of an ImageClassification, or of any module that keeps a timm network
    as `net` and its name as the hyperparameter `backbone`, the checkpoint is loaded into a plain timm model and
    tested again on the same images, to prove that nothing of this package is needed to use it.

    Args:
        dirpath: Folder of the report. Default: the folder `report` beside the metrics of the run.
        check_reload: Test the checkpoint a second time, in a plain timm model. It takes as long as the test.
    """

    def __init__(self, dirpath: str | None = None, check_reload: bool = True) -> None:
        super().__init__()
        # Here and not when there is something to draw: nobody should learn of it after hours of training.
        for package in ("matplotlib", "rich"):
            if importlib.util.find_spec(package) is None:
                remedy = f"Run: pip install {package}"
                raise MissingDependency(complaint(package, "not installed", f"{package}, for FinetuneReport", remedy))
        if dirpath is not None and Path(dirpath).exists() and not Path(dirpath).is_dir():
            raise FinetuneBNError(complaint("dirpath", dirpath, "a folder, or a path where one can be made"))
        self.dirpath = dirpath
        self.check_reload = check_reload
        self.history: list[dict[str, float | None]] = []
        self.path: Path | None = None
        self._folder = Path()
        self._epoch: int | None = None
        self._seen: dict[str, Tensor] = {}
        self._written: TrainingReport | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # log_dir is agreed on by all processes, so it is asked for in all of them.
        log_dir = trainer.log_dir or trainer.default_root_dir
        self._folder = Path(self.dirpath) if self.dirpath is not None else Path(log_dir) / "report"
        self._written = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.history = [record for record in self.history if (record["epoch"] or 0) < trainer.current_epoch]
        self._epoch, self._seen = None, {}

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # What the module logged in its own on_train_epoch_end, which comes after ours.
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
            self._write(replace(report, notes=[*report.notes, "The test: this was written at the end of training."]))

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        confusion = getattr(pl_module, "test_confusion", None)
        confusion = confusion.compute() if hasattr(confusion, "compute") else confusion
        domains = _domains(trainer)
        reload = self._reload(trainer, pl_module, domains)
        for error in reload.errors:
            rank_zero_warn(f"FinetuneReport: {error}")
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        accuracies, overall = _accuracies(metrics, domains)
        results = [
            replace(again, accuracy=accuracy) for again, accuracy in zip(reload.results, accuracies, strict=True)
        ]
        report = self._describe(trainer, pl_module, trainer.ckpt_path)
        notes = [*report.notes, *reload.notes]
        if not torch.is_tensor(confusion):
            notes.append(f"The confusion matrix: {type(pl_module).__name__} has none as `test_confusion` after its test.")
            confusion = None
        if overall is None and not any(accuracy is not None for accuracy in accuracies):
            notes.append("The test accuracy: nothing from 0 to 1 was logged with `acc` in its name.")
        report = replace(
            report,
            results=results,
            overall=_together(results, overall) if len(results) > 1 else None,
            test_metrics=metrics,
            confusion=confusion,
            class_names=[] if confusion is None else _class_names(pl_module, len(confusion)),
            tolerance=reload.tolerance,
            errors=reload.errors,
            notes=notes,
        )
        self._write(report)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Behind the last lines of progress bars and of Lightning's own table.
        if self._written is None or self.path is None:
            return
        if self._written.results:
            _print_results(self._written)
        shown = self.path.resolve()
        print(f"Report: {shown.relative_to(Path.cwd()) if shown.is_relative_to(Path.cwd()) else shown}", flush=True)
        self._written = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        loaded = state_dict["history"]
        # A test after training loads the best checkpoint, which knows fewer epochs of the same training.
        same = all(old.items() <= new.items() for old, new in zip(loaded, self.history, strict=False))
        if len(loaded) > len(self.history) or not same:
            self.history = loaded

    def _record(self, trainer: pl.Trainer) -> None:
        """Add to the current epoch's record what was logged anew since the last call."""
        if self._epoch is None:
            return
        metrics = trainer.callback_metrics
        # Lightning keeps the last value of what is not logged in each epoch; its tensor is then still the same one.
        fresh = {name: value for name, value in metrics.items() if self._seen.get(name) is not value}
        self._seen = dict(metrics)
        if not self.history or self.history[-1]["epoch"] != self._epoch:
            self.history.append({"epoch": self._epoch})
        for name, value in fresh.items():
            base = name.removesuffix("_step").removesuffix("_epoch")
            if (base == name or base not in metrics) and value.numel() == 1:
                number = float(value)
                self.history[-1][name] = number if math.isfinite(number) else None

    def _describe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> TrainingReport:
        """Return what can be said without a test."""
        backbone, num_classes, arguments = _backbone(pl_module)
        datamodule = getattr(trainer, "datamodule", None)
        name = backbone or type(pl_module).__name__
        batch_norm = _batch_norm(trainer, pl_module)
        facts = [
            f"BatchNorm: {batch_norm}",
            f"{num_classes} classes" if num_classes else "",
            f"{len(self.history)} epoch{'s' * (len(self.history) != 1)}" if self.history else "",
            *(
                f"{word} {value}"
                for word, holder, attribute in (("batch size", datamodule, "batch_size"), ("lr", pl_module, "lr"))
                if isinstance(value := getattr(holder, attribute, None), (int, float))
            ),
        ]
        bad = {
            name: [f"{record['epoch']:.0f}" for record in self.history if name in record and record[name] is None]
            for name in dict.fromkeys(name for record in self.history for name in record)
        }
        relative = None if checkpoint is None else Path(os.path.relpath(checkpoint, self._folder)).as_posix()
        done = "fine-tuned" if self.history else "tested"
        return TrainingReport(
            title=f"{name} {done} on {type(datamodule).__name__}" if datamodule is not None else f"{name} {done}",
            subtitle=" · ".join(filter(None, facts)),
            batch_norm=batch_norm,
            history=self.history,
            checkpoint=relative,
            loading_code=timm_code(backbone, num_classes, relative, arguments) if backbone and relative else "",
            notes=[f"{name} in epoch {', '.join(epochs)}: not finite." for name, epochs in bad.items() if epochs],
            versions=_versions(),
        )

    def _reload(self, trainer: pl.Trainer, pl_module: pl.LightningModule, domains: Sequence[str]) -> _Reload:
        empty = [DomainResult(domain) for domain in domains]
        why = _why_not(trainer, pl_module) if self.check_reload else "switched off (check_reload is false)."
        if why is not None:
            return _Reload(empty, notes=[f"The test of the checkpoint in plain timm: {why}"])
        rank_zero_info("FinetuneReport: loading the checkpoint into plain timm and testing it.")
        tolerance = TOLERANCE[next(pl_module.net.parameters()).dtype]  # type: ignore[union-attr, operator]
        try:
            results, failure = _test_reloaded(trainer, pl_module, domains), ""
        except Exception as error:  # whatever it is, the report of the training must not be lost to it
            results, failure = empty, f"{type(error).__name__}: {error}"
        results = _over_ranks(trainer, results)
        if any(result.images is None for result in results):
            failure = failure or "see the messages of the other processes."
            return _Reload(empty, errors=[f"The checkpoint could not be tested in plain timm: {failure}"])
        return _Reload(results, tolerance, errors=_differences(results, tolerance))

    def _write(self, report: TrainingReport) -> None:
        self.path = report.write(self._folder)
        self._written = report


@dataclass(frozen=True)
class _Reload:
    results: Sequence[DomainResult]
    tolerance: float | None = None
    errors: Sequence[str] = ()
    notes: Sequence[str] = ()
