"""Recalibrate BatchNorm layers while a Trainer runs: before validation and checkpoint, at the start, or for a test."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from typing_extensions import override

from finetune_bn.callbacks.batches import ModuleBatches, flattened, pooled_batches, training_batches
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
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.recalibration.bank import StatisticsBank
from finetune_bn.recalibration.recalibrate import recalibrate
from finetune_bn.recalibration.record import Recalibration
from finetune_bn.recalibration.settings import How, Mode, Part, RecalibrationSettings

When = Literal["validation", "steps", "fit_start", "test"]
WHEN: tuple[When, ...] = get_args(When)
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
        mode: exact: all images together, layer by layer, so that it does not matter how they are cut into batches.
            one_pass: each chunk of images is normalized by itself. auto: exact where the activations fit in memory.
        how: renormalize: gamma and beta keep their values and the function changes. preserve: the function stays, and
            gamma and beta are solved anew.
        part: The mean and the variance (both), or one of them.
        prior: Weight of the statistics from before, in images.
        max_samples: How many images are taken at most, over all processes; null takes all.
        min_samples: Fewer images are an error.
        tolerance: Stop when the standard error of all statistics is at most this, in standard deviations.
        batch_size: Images that one_pass normalizes together. Default: as many as fit in memory, 1,024 at most.
        memory: Bytes for activations that wait in mode exact. Default: half of what the device has free.
        seed: Decides the order of the images, and so which are taken.
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
        mode: Mode = "auto",
        how: How = "renormalize",
        part: Part = "both",
        prior: float = 0,
        max_samples: int | None = 4096,
        min_samples: int = 8,
        tolerance: float | None = None,
        batch_size: int | None = None,
        memory: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if when not in WHEN:
            raise FinetuneBNError(complaint("when", when, ", ".join(WHEN)))
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise FinetuneBNError(complaint(name, value, "a whole number from 1 up"))
        if (when == "steps") != (every_n_steps is not None):
            raise FinetuneBNError(complaint("every_n_steps", every_n_steps, "a number with when=steps, and only then"))
        if temporary and when in ("fit_start", "test"):
            remedy = "test always gives the network its own statistics back." if when == "test" else ""
            raise FinetuneBNError(complaint("temporary", True, f"false with when={when}", remedy))
        if per_domain and (when != "test" or data is not None):
            raise FinetuneBNError(complaint("per_domain", True, "true with when=test and without data"))
        if source_first and (when != "test" or data is not None):
            remedy = "In training use how=preserve."
            raise FinetuneBNError(complaint("source_first", True, "true with when=test and without data", remedy))
        if when == "test" and how == "preserve":
            remedy = "Preserving the function changes nothing in a test."
            raise FinetuneBNError(complaint("how", how, "renormalize with when=test", remedy))
        self.when, self.data = when, data
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.temporary, self.per_domain, self.source_first = temporary, per_domain, source_first
        self.module, self.layers, self.seed = module, layers, seed
        self.settings = RecalibrationSettings(
            mode, how, part, prior, max_samples, min_samples, tolerance, batch_size, memory
        )
        self.record: Recalibration | None = None
        self.bank: StatisticsBank | None = None
        self._own = OwnStatistics()
        self._metrics: dict[str, float] = {}
        self._said: set[str] = set()
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
            self._say(f"there are no BatchNorm layers in {type(target).__name__}, so nothing is recalibrated")
            return None
        settings = self.settings if settings is None else settings
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and self.when in ("validation", "steps") and settings.how == "renormalize":
            self._warn_of_frozen(frozen_layers(target))
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
                arguments = dataclasses.asdict(settings)
                self.record = recalibrate(target, batches, layers=self.layers, progress=progress, **arguments)
        for warning in self.record.warnings:
            self._say(warning)
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
            self._say(f"there are no training images ({error}), so {_FROZEN_TRAP}")
            return
        self.recalibrate(trainer, pl_module, batches, progress, settings)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_whole_network(trainer)
        self._own.put_back()
        self._said.clear()
        self._metrics.clear()
        self._step = -1
        if stage == "fit" and self._averaging(trainer):
            self._check_averaging(trainer)

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
        target_of(pl_module, self.module)
        training_batches(trainer, pl_module, self.data, seed=self.seed)  # what is wrong with them is said now
        if self.when == "fit_start" and not trainer.global_step:
            self._run(trainer, pl_module)
            self._log(pl_module)

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
            self._log(pl_module, on_step=True)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._averaging(trainer):
            self._before_validation(trainer, pl_module)

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # WeightAveraging has put the averaged network in place only now.
        if self._averaging(trainer):
            self._before_validation(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.when == "validation" and self._step != trainer.global_step and self.should_recalibrate(trainer):
            if self._averaging(trainer):
                self._say(
                    "the averaged network is recalibrated where it is validated; this epoch ends without a validation, "
                    "so a checkpoint of it holds averaged statistics"
                )
                return
            self._run(trainer, pl_module)
        self._log(pl_module)

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
        self._log(pl_module)

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
            self._note(record)

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
                self._note(record)

    def _measure_domains(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loaders: dict[str, Any]) -> None:
        target, bank = target_of(pl_module, self.module), StatisticsBank()
        for name, loader in loaders.items():
            with torch.inference_mode(False), bank.restoring(target):
                batches = pooled_batches(trainer, pl_module, [loader], self.seed)
                record = self.recalibrate(trainer, pl_module, batches)
                if record is None:
                    return
                bank.keep(name, target)
            self._note(record, f"/{name}")
        self.bank = bank

    def _switch(self, pl_module: pl.LightningModule, loader: int) -> None:
        """Use the statistics of the domain whose batches come now."""
        if self.bank is not None and self.when == "test" and loader != self._domain:
            self._domain = loader
            self.bank.use(self.bank.names[loader], target_of(pl_module, self.module))

    def _note(self, record: Recalibration, suffix: str = "") -> None:
        """Take the figures to be logged; in words those of the first time."""
        if "" not in self._said:
            self._said.add("")
            alone = [f"left alone: {name or '(root)'} {reason}" for name, reason in record.left_alone]
            rank_zero_info("; ".join([f"BatchNormRecalibration: {str(record).splitlines()[0]}", *alone]))
        values = {"images": record.images, "shift": record.shift, "standard_error": record.standard_error}
        self._metrics |= {f"recalibration/{name}{suffix}": float(v) for name, v in values.items() if math.isfinite(v)}

    def _log(self, pl_module: pl.LightningModule, on_step: bool = False) -> None:
        """Log what there is to log; not each hook may."""
        if self._metrics:
            pl_module.log_dict(self._metrics, on_step=on_step, on_epoch=not on_step, batch_size=1, sync_dist=True)
            self._metrics = {}

    def _warn_of_frozen(self, frozen: int) -> None:
        if frozen:
            self._say(f"{frozen} frozen layers are renormalized in training: {_FROZEN_TRAP} Use how=preserve.")

    def _say(self, text: str) -> None:
        """Warn, once a run for each cause, whatever its numbers are."""
        cause = re.sub(r"[\d.]+", "#", text)
        if cause not in self._said:
            self._said.add(cause)
            rank_zero_warn(f"BatchNormRecalibration: {text}")

    def _averaging(self, trainer: pl.Trainer) -> bool:
        return any(isinstance(c, WeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]

    def _check_averaging(self, trainer: pl.Trainer) -> None:
        if self.when not in ("validation", "steps"):
            return
        if self.when == "steps" or self.temporary:
            name, value = ("when", self.when) if self.when == "steps" else ("temporary", True)
            allowed = "validation" if name == "when" else "false"
            why = "The averaged network is in place in validations only, and training never sees it."
            raise FinetuneBNError(complaint(name, value, f"{allowed}, beside WeightAveraging", why))
        callbacks: Sequence[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(c, WeightAveraging) for c in callbacks[callbacks.index(self) :]):
            given = [type(c).__name__ for c in callbacks]
            why = "It puts the averaged network in place, which is the one to recalibrate."
            raise FinetuneBNError(complaint("callbacks", given, "BatchNormRecalibration behind WeightAveraging", why))
