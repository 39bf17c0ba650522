"""Recalibrate BatchNorm layers while a Trainer runs: before validation and checkpoint, at the start, or for a test."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from finetune_bn.callbacks.averaging import check_average_begins, warn_of_idle_average
from finetune_bn.callbacks.batches import ModuleBatches, flattened, pooled_batches, training_batches, try_batch
from finetune_bn.callbacks.module import (
    OwnStatistics,
    broadcast_statistics,
    check_whole_network,
    frozen_layers,
    load_sources,
    loader_names,
    sources_of,
    target_of,
)
from finetune_bn.callbacks.notes import Notes
from finetune_bn.callbacks.timing import When, check_averaging, check_test, check_timing
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.recalibration.bank import StatisticsBank
from finetune_bn.recalibration.recalibrate import recalibrate
from finetune_bn.recalibration.record import Recalibration
from finetune_bn.recalibration.settings import RecalibrationSettings

CHECKPOINT_KEY = "finetune_bn_recalibration"
_FROZEN_TRAP = (
    "a network that was fine-tuned with frozen layers works by the statistics that these had, and loses its function "
    "where they are replaced by others."
)
_TRIAL_IMAGES = 64  # are enough for a run that only looks for faults (fast_dev_run)


class BatchNormRecalibration(Callback):
    """Give BatchNorm layers, live or frozen, the statistics of i.i.d. images, measured anew by the weights of today.

    Running statistics lag behind the weights, and where training batches are small, sorted, or of P labels x K images,
    they are off. By default the layers are recalibrated when a validation starts, so that the validation metrics and
    the checkpoint both see it; in an epoch without validation, at its end. The images are those of the training set in
    random order, whatever sampler the training uses, without its augmentation where the data module is one of
    finetune_bn; over several processes each takes its part, and the statistics are pooled.

    Works with any LightningModule whose `forward` takes the images of a batch (else name the part that does by
    `module`), behind its batch hooks and in the Trainer's precision. Beside WeightAveraging it recalibrates the
    averaged network, which is the one that is validated and saved; put it behind that callback. Logged are
    recalibration/images, recalibration/shift (how far the means moved, in standard deviations) and
    recalibration/standard_error. An error leaves the network as it was.

    Attributes:
        record: what the last recalibration measured, layer by layer.
        bank: with per_domain, the statistics of each domain of the last test.

    Args:
        when: At what time. validation: in each fit, when validations start (not the sanity check). steps: in training,
            every so many steps. fit_start: once, before the first training step, not when a training is resumed. test:
            for `test` and `predict`, on the images that are tested, without their labels; afterwards the network has
            its own statistics again.
        data: The images: a DataLoader, taken as it is, or a data module. Default: those of the training, or of the
            test.
        every_n_epochs: With when=validation, in every so many epochs; the last epoch always counts.
        every_n_steps: With when=steps, after every so many optimizer steps.
        temporary: The training itself goes on with its own statistics: the new ones are there from the validation
            until the next training step. A checkpoint that is saved in between holds the new ones in its weights, and
            beside them those of the training, with which a resumed training goes on.
        per_domain: With when=test, each test loader has statistics of its own. Else they are of all test images mixed.
        source_first: With when=test, give the layers the statistics of the training images first, the function
            preserved. A network that was fine-tuned with frozen layers works by the statistics of its pretraining, and
            to replace those by other images' destroys it. Default: where there are frozen layers.
        module: Attribute path of the part that takes the images and whose layers are recalibrated, such as `net`.
            By default the whole LightningModule.
        layers: Name patterns of the layers, such as `layer4.*`, relative to module; all by default.
        max_samples: How many images are taken at most, over all processes; null takes all.
        forward: The function `(module, batch)` that passes a batch to the part, by its import path; for batches that
            are no tensor, or that the part's `forward` does not take as they are. Default: the first tensor of a batch.
        mask: The function `(batch)` that tells which values of a padded batch count, by its import path; see
            `finetune_bn.recalibrate`.
        seed: Decides the order of the images, and so which are taken.
        settings: The other arguments of a recalibration, see `RecalibrationSettings`.
    """

    def __init__(
        self,
        when: When = "validation",
        data: DataLoader[Any] | pl.LightningDataModule | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        temporary: bool = False,
        per_domain: bool = False,
        source_first: bool | None = None,
        module: str | None = None,
        layers: str | list[str] = "*",
        max_samples: int | None = 4096,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        mask: Callable[[Any], Any] | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.settings = RecalibrationSettings(max_samples=max_samples, **settings)
        check_timing(when, every_n_epochs, every_n_steps, temporary)
        check_test(when, data, per_domain, source_first, self.settings.how)
        self.when, self.data = when, data
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.temporary, self.per_domain, self.source_first = temporary, per_domain, source_first
        self.module, self.layers, self.seed = module, layers, seed
        self.forward, self.mask = forward, mask
        self.record: Recalibration | None = None
        self.bank: StatisticsBank | None = None
        self._own = OwnStatistics()
        self._notes = Notes("BatchNormRecalibration")
        self._step = -1
        self._domain: int | None = None

    def should_recalibrate(self, trainer: pl.Trainer) -> bool:
        """Tell whether the epoch under way is one of those with a recalibration; to be overridden."""
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs or 0 < trainer.max_steps <= trainer.global_step
        return last or epoch % self.every_n_epochs == 0

    def recalibrate(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batches: ModuleBatches | None = None,
        progress: bool | None = False,
        settings: RecalibrationSettings | None = None,
    ) -> Recalibration | None:
        """Recalibrate now.

        Args:
            trainer: the Trainer that the module is attached to.
            pl_module: the module.
            batches: the batches to measure; None takes what the arguments say.
            progress: show a progress bar of its own; None: on a terminal.
            settings: how it is done; None: as the arguments say.

        Returns:
            What was measured; None where there are no BatchNorm layers, of which is warned once.
        """
        target = target_of(pl_module, self.module)
        if not find_batch_norms(target):
            self._notes.say(f"there are no BatchNorm layers in {type(target).__name__}, so nothing is recalibrated")
            return None
        settings = self.settings if settings is None else settings
        fitting = trainer.state.fn == TrainerFn.FITTING
        renormalized = fitting and self.when in ("validation", "steps") and settings.how == "renormalize"
        if renormalized and (frozen := frozen_layers(target)):
            self._notes.say(f"{frozen} frozen layers are renormalized in training: {_FROZEN_TRAP} Use how=preserve.")
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            images = min(settings.max_samples or _TRIAL_IMAGES, _TRIAL_IMAGES)
            settings = dataclasses.replace(settings, max_samples=images)
        # Tests run in inference mode, and tensors that are made in it are of no use outside.
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "recalibrate: ")  # said below, once a cause
            if batches is None:
                batches = training_batches(trainer, pl_module, self.data, seed=self.seed)
            broadcast_statistics(target)
            with trainer.precision_plugin.forward_context():
                arguments: dict[str, Any] = dataclasses.asdict(settings)
                arguments |= {"layers": self.layers, "forward": self.forward, "mask": self.mask, "progress": progress}
                self.record = recalibrate(target, batches, **arguments)
        for warning in self.record.warnings:
            self._notes.say(warning)
        return self.record

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule, progress: bool | None = False) -> None:
        """Give frozen layers the statistics of the training images, the function preserved, where that is asked for.

        Raises:
            FinetuneBNError: it is asked for by `source_first=True`, and there are no training images.
        """
        target = target_of(pl_module, self.module)
        if self.settings.how == "preserve" or self.source_first is False:
            return
        if self.source_first is None and not frozen_layers(target):
            return
        settings = dataclasses.replace(self.settings, how="preserve", part="both", prior=0, tolerance=None)
        try:
            if trainer.datamodule is not None:  # type: ignore[attr-defined]
                trainer.datamodule.setup("fit")  # type: ignore[attr-defined]
            batches = training_batches(trainer, pl_module, seed=self.seed)
        except FinetuneBNError as error:
            if self.source_first:
                raise
            self._notes.say(f"there are no training images ({error}), so {_FROZEN_TRAP}")
            return
        self.recalibrate(trainer, pl_module, batches, progress, settings)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_whole_network(trainer)
        self._own.put_back()
        self._notes.forget()
        self._step = -1
        if stage == "fit" and self._averaging(trainer):
            check_averaging(trainer, self, self.when, self.temporary)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint.get(CHECKPOINT_KEY, {})
        load_sources(pl_module, state.get("sources", {}))
        if trainer.state.fn != TrainerFn.FITTING:
            return  # what is tested is what was validated
        now = pl_module.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, value in state.get("of_training", {}).items():
                now[name].copy_(value)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step if self.when == "steps" else -1
        if self.when == "test":
            return
        check_average_begins(trainer)
        batches = training_batches(trainer, pl_module, self.data, seed=self.seed)
        target = target_of(pl_module, self.module)
        if find_batch_norms(target):
            try_batch(trainer, target, batches, self.forward)  # what is wrong with them is said now
        if self.when == "fit_start" and not trainer.global_step:
            self._run(trainer, pl_module)
            self._notes.log(pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._own.put_back()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._own.put_back()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With gradient accumulation several batches see the same step.
        if self.every_n_steps and trainer.global_step != self._step and trainer.global_step % self.every_n_steps == 0:
            self._run(trainer, pl_module)
            self._notes.log(pl_module, on_step=True)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._averaging(trainer):
            self._before_validation(trainer, pl_module)

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # WeightAveraging has put the averaged network in place only now.
        if self._averaging(trainer):
            warn_of_idle_average(trainer)
            self._before_validation(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._notes.log(pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.when == "validation" and self._step != trainer.global_step and self.should_recalibrate(trainer):
            if self._averaging(trainer):
                self._notes.say(
                    "the averaged network is recalibrated where it is validated; this epoch ends without a validation, "
                    "so a checkpoint of it holds averaged statistics"
                )
                return
            self._run(trainer, pl_module)
        self._notes.log(pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._own.put_back()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CHECKPOINT_KEY] = {"of_training": dict(self._own.by_name), "sources": sources_of(pl_module)}

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._adapt(trainer, pl_module, trainer.test_dataloaders)

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._switch(pl_module, dataloader_idx)

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._notes.log(pl_module)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._own.put_back()

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._adapt(trainer, pl_module, trainer.predict_dataloaders)

    @override
    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._switch(pl_module, dataloader_idx)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._own.put_back()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._own.put_back()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._own.put_back()

    def _before_validation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self.when == "validation" and fitting and self.should_recalibrate(trainer):
            self._run(trainer, pl_module)

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._own.put_back()
        self._step = trainer.global_step
        if self._averaging(trainer) and self.settings.how == "renormalize" and sources_of(pl_module):
            raise FinetuneBNError(
                complaint(
                    "how",
                    "renormalize",
                    "preserve, for layers with affine='merged' beside WeightAveraging",
                    "It averages gamma' and beta', and not the statistics from before the conversion.",
                )
            )
        if self.temporary:
            self._own.keep(pl_module)
        with self._own.back_on_error():
            record = self.recalibrate(trainer, pl_module)
        if record is not None:
            self._notes.take(record)

    def _adapt(self, trainer: pl.Trainer, pl_module: pl.LightningModule, test_loaders: Any) -> None:
        """Give the network the statistics of the images that are to be tested, for the time of the test."""
        if self.when != "test":
            return
        loaders = flattened(test_loaders)
        names = loader_names(trainer, len(loaders))
        self._own.keep(pl_module)
        self.bank = self._domain = None
        with self._own.back_on_error():
            if self.data is None:
                self.prepare(trainer, pl_module)
            if self.per_domain:
                self._measure_domains(trainer, pl_module, dict(zip(names, loaders, strict=True)))
                return
            batches = None if self.data is not None else pooled_batches(trainer, pl_module, loaders, self.seed)
            record = self.recalibrate(trainer, pl_module, batches)
            if record is not None:
                self._notes.take(record)

    def _measure_domains(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loaders: dict[str, Any]) -> None:
        target, bank = target_of(pl_module, self.module), StatisticsBank()
        for name, loader in loaders.items():
            with torch.inference_mode(False), bank.restoring(target):
                batches = pooled_batches(trainer, pl_module, [loader], self.seed)
                record = self.recalibrate(trainer, pl_module, batches)
                if record is None:
                    return
                bank.keep(name, target)
            self._notes.take(record, f"/{name}")
        self.bank = bank

    def _switch(self, pl_module: pl.LightningModule, loader: int) -> None:
        """Use the statistics of the domain whose batches come now."""
        if self.bank is not None and self.when == "test" and loader != self._domain:
            self._domain = loader
            self.bank.use(self.bank.names[loader], target_of(pl_module, self.module))

    def _averaging(self, trainer: pl.Trainer) -> bool:
        return any(isinstance(c, WeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
