"""Report a fine-tuning: its curves, its test, and the test again after the checkpoint is loaded into plain timm."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from collections.abc import Sequence
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

from finetune_bn.callbacks.model_file import write_model_file
from finetune_bn.callbacks.module import loader_names
from finetune_bn.callbacks.reload import Reload, end_adaptation, reload_and_test, timm_net
from finetune_bn.callbacks.report_facts import (
    batch_norm,
    class_names,
    not_finite,
    other_accuracies,
    print_results,
    results_of,
    versions,
)
from finetune_bn.callbacks.worst_images import WorstImages
from finetune_bn.diagnosis.loading_code import timm_code
from finetune_bn.diagnosis.status import Status, status
from finetune_bn.diagnosis.training_page import WorstImage
from finetune_bn.diagnosis.training_report import TrainingReport
from finetune_bn.errors import FinetuneBNError, MissingDependency, complaint
from finetune_bn.utilities.checks import number

_FILES = ("report.html", "report.json", "report.png")
MODEL_FILE = "model.safetensors"


class FinetuneReport(Callback):
    """Write a report of the training and the test: a page for the browser, a figure, numbers as JSON, and the model.

    Works with any LightningModule. The curves show what it logs with `loss` or `acc` in the name, the bars its test
    accuracy on each test loader. After the test of a checkpoint of ImageClassification, or of any module that keeps a
    timm network as `net` and its name as hyperparameter `backbone`, the checkpoint is loaded into a plain timm model
    and tested again on the same images: nothing of this package is needed to use what was trained. Beside the report
    lies model.safetensors, with the weights of the best checkpoint (after a test: of that which was tested), the names
    of the classes and how images are prepared: `finetune_bn.load(path).predict("image.jpg")` uses it.

    Args:
        dirpath: Folder of the report. Default: the folder `report` beside the metrics of the run. Where another run has
            left its report there, a number is put behind the name.
        check_reload: Test the checkpoint a second time, in plain timm. It takes about as long as the test.
        save_model: Write model.safetensors.
        worst_images: Show so many of the images with the highest loss: of the test, else of the last validation. They
            lie in the page itself, as the network saw them; 0 shows none.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        check_reload: bool = True,
        save_model: bool = True,
        worst_images: int = 12,
    ) -> None:
        super().__init__()
        # Here and not when there is something to draw: nobody should learn of it after hours of training.
        for package in ("matplotlib", "rich"):
            if importlib.util.find_spec(package) is None:
                remedy = f"Run: pip install {package}"
                raise MissingDependency(complaint(package, "not installed", f"{package}, for FinetuneReport", remedy))
        if dirpath is not None and Path(dirpath).exists() and not Path(dirpath).is_dir():
            raise FinetuneBNError(complaint("dirpath", dirpath, "a folder, there already or to be made"))
        self.dirpath = dirpath
        self.worst_images = number("worst_images", worst_images, least=0, whole=True)
        self.check_reload, self.save_model = check_reload, save_model
        self.history: list[dict[str, float | None]] = []
        self.path: Path | None = None
        self._base = self._folder = Path()
        self._claimed = False
        self._status: Status | None = None
        self._epoch: int | None = None
        self._seen: dict[str, Tensor] = {}
        self._news: TrainingReport | None = None
        self._worst = WorstImages(self.worst_images)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning wants all processes to ask for log_dir.
        log_dir = trainer.log_dir or trainer.default_root_dir
        base = Path(log_dir, "report") if self.dirpath is None else Path(self.dirpath)
        if stage == "fit" or base != self._base:
            self._claimed = False  # another run, whose report is another one
        self._base, self._news = base, None
        if trainer.is_global_zero:
            _check_writable(base)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Only now is it known where a resumed training goes on.
        self.history = [record for record in self.history if (record["epoch"] or 0) < trainer.current_epoch]
        progress: Any = trainer.fit_loop.epoch_progress.current
        amid = trainer.fit_loop.restarted_mid_epoch and progress.processed < progress.ready
        self._epoch, self._seen = trainer.current_epoch if amid else None, {}
        self._status = status(pl_module)

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
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._worst.start(trainer, pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._worst.add(batch, batch_idx, dataloader_idx)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._worst.stop()

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._worst.start(trainer, pl_module)

    @override
    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._worst.add(batch, batch_idx, dataloader_idx)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._worst.stop()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loaders = tree_leaves(trainer.val_dataloaders)
        worst = self._worst.gathered(trainer, pl_module, loaders, loader_names(trainer, len(loaders)))
        if trainer.is_global_zero:
            best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
            report = self._with_worst(self._describe(trainer, pl_module, best), worst, "last validation's images")
            report = replace(report, notes=[*report.notes, "The test: none was run since the training."])
            self._write(self._with_model(trainer, pl_module, report, best))

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._worst.stop()
        loaders = tree_leaves(trainer.test_dataloaders)
        domains = loader_names(trainer, len(loaders), alone="all")
        worst = self._worst.gathered(trainer, pl_module, loaders, domains)
        # In all processes: a metric over several of them, as the confusion matrix may be, is computed by all.
        confusion: Any = getattr(pl_module, "test_confusion", None)
        confusion = confusion.compute() if callable(getattr(confusion, "compute", None)) else confusion
        adapted = end_adaptation(trainer, pl_module)
        again = Reload(left_out="check_reload is false")
        if self.check_reload:
            rank_zero_info("FinetuneReport: the checkpoint is tested once more, in plain timm.")
            again = reload_and_test(trainer, pl_module, domains)
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        results, overall = results_of(metrics, domains, again)
        report = self._with_worst(self._describe(trainer, pl_module, trainer.ckpt_path), worst, "test images")
        notes = list(report.notes)
        problems = [again.problem] if again.problem else [] if adapted else other_accuracies(results)
        errors = [f"The checkpoint in plain timm: {problem}." for problem in problems]
        if adapted:
            notes.append(
                "The statistics of the test: BatchNormRecalibration took them from the test images, and no file holds "
                "them. The checkpoint, the model file and plain timm have their own, and so another accuracy."
            )
        if again.left_out:
            notes.append(f"The test of the checkpoint in plain timm: {again.left_out}.")
        if not torch.is_tensor(confusion):
            notes.append(f"The confusion matrix: {type(pl_module).__name__} has no `test_confusion` after its test.")
            confusion = None
        if all(result.accuracy is None for result in (*results, overall)):
            notes.append("The test accuracy: no share from 0 to 1 was logged under a name with `acc` in it.")
        for error in errors:
            rank_zero_warn(f"FinetuneReport: {error}")
        if len(domains) > 1 and trainer.test_loop.verbose:
            # Lightning's own table repeats what is of all loaders beside each; ours is printed by `teardown`.
            trainer.test_loop.verbose = False
        self._write(
            self._with_model(
                trainer,
                pl_module,
                replace(
                    report,
                    results=results,
                    overall=overall if len(results) > 1 else None,
                    test_metrics=metrics,
                    confusion=confusion,
                    class_names=[] if confusion is None else class_names(trainer, pl_module, len(confusion)),
                    tolerance=again.tolerance,
                    errors=errors,
                    notes=notes,
                ),
                trainer.ckpt_path,
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
            print_results(self._news)
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
        self._claim()
        recipe = timm_net(pl_module)
        datamodule = getattr(trainer, "datamodule", None)
        layers = batch_norm(trainer, pl_module)
        facts = {
            "classes": recipe.num_classes if recipe else None,
            "epoch" if len(self.history) == 1 else "epochs": len(self.history) or None,
            "images a batch": getattr(datamodule, "batch_size", None),
        }
        lr = pl_module.hparams.get("lr")
        how = [
            f"BatchNorm: {layers.partition('; ')[0]}",
            *(f"{n} {what}" for what, n in facts.items() if n is not None),
        ]
        relative = None if checkpoint is None else Path(os.path.relpath(checkpoint, self._folder)).as_posix()
        what = f"{recipe.name if recipe else type(pl_module).__name__} {'fine-tuned' if self.history else 'tested'}"
        return TrainingReport(
            title=what if datamodule is None else f"{what} on {type(datamodule).__name__}",
            subtitle=" · ".join(how + ([] if lr is None else [f"learning rate {lr:g}"])),
            batch_norm=layers,
            layers=self._status,
            history=self.history,
            checkpoint=relative,
            loading_code=timm_code(*recipe[:2], relative, recipe.arguments) if recipe and relative else "",
            notes=not_finite(self.history),
            versions=versions(),
        )

    def _with_worst(self, report: TrainingReport, worst: Sequence[WorstImage], of: str) -> TrainingReport:
        """Return the report with the images, or with the reason why there are none."""
        left_out = [f"The worst images: {self._worst.left_out}."] if self._worst.left_out and not worst else []
        return replace(report, worst=worst, worst_of=of, notes=[*report.notes, *left_out])

    def _with_model(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: TrainingReport, checkpoint: Any
    ) -> TrainingReport:
        """Write the model file, and return the report with its path, or with the reason why there is none."""
        if not self.save_model:
            return replace(report, notes=[*report.notes, "The model file: save_model is false."])
        outputs = getattr(getattr(pl_module, "net", None), "num_classes", 0)
        about: dict[str, Any] = {"title": report.title, "subtitle": report.subtitle, "checkpoint": report.checkpoint}
        about["test_metrics"] = {name: value for name, value in report.test_metrics.items() if math.isfinite(value)}
        names: Sequence[str] = class_names(trainer, pl_module, outputs) if isinstance(outputs, int) else ()
        path = self._folder / MODEL_FILE
        said = write_model_file(trainer, pl_module, path, checkpoint, names, about)
        if not path.exists() and "has no timm network" not in said[0]:
            rank_zero_warn(f"FinetuneReport: no model file was written. {said[0]}")
        return replace(report, model_file=MODEL_FILE if path.exists() else None, notes=[*report.notes, *said])

    def _claim(self) -> None:
        """Take the folder in which no other run has its report."""
        for i in itertools.count():
            if self._claimed:
                return
            self._folder = self._base.with_name(f"{self._base.name}-{i}") if i else self._base
            try:
                self._folder.mkdir(parents=True)
                self._claimed = True
            except FileExistsError:
                self._claimed = not any((self._folder / name).exists() for name in _FILES)

    def _write(self, report: TrainingReport) -> None:
        self.path = report.write(self._folder)
        self._news = report


def _check_writable(folder: Path) -> None:
    """Raise where no folder can be made, before a training whose report would be lost."""
    there = next((parent for parent in (folder, *folder.absolute().parents) if parent.exists()), Path("/"))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise FinetuneBNError(complaint("dirpath", str(folder), "a folder that can be written to"))
