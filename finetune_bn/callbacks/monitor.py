"""Watch, now and then, what BatchNorm layers make of the training batches, and say in words when it matters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from finetune_bn.callbacks.averaging import check_average_begins, warn_of_idle_average
from finetune_bn.callbacks.lightning_names import logged_step
from finetune_bn.callbacks.module import check_whole_network, part_of
from finetune_bn.diagnosis.advice import Look, advise, fisher
from finetune_bn.diagnosis.inspector import Inspector, LayerLook, layer_inputs
from finetune_bn.diagnosis.leakage import Leakage, measure_leakage, output_gap
from finetune_bn.diagnosis.network_call import NetworkCall
from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.layers.sites import BatchNormSite, find_batch_norms
from finetune_bn.layers.tracking import TrackingBatchNorm
from finetune_bn.recalibration.iid_test import Membership
from finetune_bn.utilities.batches import Chunk
from finetune_bn.utilities.checks import number
from finetune_bn.utilities.labels import LabelNumbers, labels_of
from finetune_bn.utilities.probe import quietly

# Batches of which two images are kept until the next look; so many are compared with each other.
_COMPARED = 12


class BatchNormMonitor(Callback):
    """Watch what the BatchNorm layers make of the training batches, log it, and say when something should be done.

    Every so many training batches the batch is passed through the network again, once in eval mode and once with
    BatchNorm as in training, without gradients and with dropout off. The training itself is the same to the last bit
    as without the monitor: weights, running statistics, modes and random numbers are left alone.

    Logged to all loggers of the Trainer are, as averages over the layers that they concern:
    bn/drift, the distance of the batch mean from the running mean, in running standard deviations;
    bn/drift_z, the same in standard errors, about 1 where nothing has drifted;
    bn/log_var_ratio, of batch to running variance;
    bn/rho, the share of the variance of images' channel means that lies between labels;
    bn/deff and bn/n_eff, how many independent images a batch is worth, as images of one label resemble each other;
    bn/running_var_bias, how far off the running variances will settle.
    And of the whole network:
    bn/p_value, how likely batches drawn at random would differ as much as these (small batches: not at each look);
    bn/train_eval_gap, between the outputs in the two modes, relative to the distance between two images;
    bn/leakage, how far an output moves when the other images of its batch are exchanged, in the same unit;
    bn/dead, the channels without variance, bn/died, those of them that had some in the beginning, and bn/not_finite,
    those with NaN or infinite values;
    bn/single_value_batches, batches with one value a channel, from the layers that count them.
    bn_layers/FIGURE/LAYER are those of each layer. What depends on labels needs them in the batch.

    When one of them matters, a warning says so with the remedy, once a training for each cause; of frozen layers there
    is nothing to say. Works with any LightningModule that calls its network once or more in a training step, in any
    precision and with gradient accumulation. In a distributed run all processes look, each at its own batch, and the
    first one's figures are logged.

    Attributes:
        look: what the latest look has found.
        metrics: the figures that were logged of it.
        causes: the causes of the warnings given, in order.

    Args:
        every_n_steps: How many training batches (forward passes, also with gradient accumulation) lie between two
            looks; the first look is at batch 12. By default they take less than 1 % of the training time.
        leakage_every_n_looks: How many looks lie between two tests for leakage, which need two more passes; 0 never
            tests.
        module: Attribute path of the network to watch, such as `net` or `model.backbone`. By default what the training
            step calls, on the way to where most BatchNorm layers are.
        labels: Where the labels are in a batch, a position in a tuple or a key of a dictionary. By default the second
            part of a tuple, and labels, label, targets, target or y in a dictionary.
        per_layer: Log the figures of each layer too.
    """

    def __init__(
        self,
        every_n_steps: int = 200,
        leakage_every_n_looks: int = 10,
        module: str | None = None,
        labels: int | str | None = None,
        per_layer: bool = True,
    ) -> None:
        super().__init__()
        self.every_n_steps = number("every_n_steps", every_n_steps, least=1, whole=True)
        self.leakage_every_n_looks = number("leakage_every_n_looks", leakage_every_n_looks, least=0, whole=True)
        self.module, self.labels, self.per_layer = module, labels, per_layer
        self._call = NetworkCall()
        self._interval = self._until_look = 0
        self._begin(world_size=1)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_whole_network(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_average_begins(trainer)
        self._begin(trainer.world_size)
        sites = find_batch_norms(part_of(pl_module, self.module))
        self._on = bool(sites)
        if not sites:
            self._warn("", f"there are no BatchNorm layers in {type(pl_module).__name__}, so nothing is monitored")
            return
        self._inspector.begin(sites)
        self._fallbacks = _fallbacks(sites)
        self._synchronized = trainer.world_size > 1 and any(isinstance(s.module, nn.SyncBatchNorm) for s in sites)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._on:
            self._until_look -= 1
            if self._until_look % self._stride == 0:
                self._call.await_in(part_of(pl_module, self.module))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._on:
            return
        if self._until_look % self._stride == 0:
            self._keep(batch)
        if self._until_look == 0:
            self._interval = self._until_look = self.every_n_steps
            chunk = self._call.chunk
            if self._agree(trainer, chunk is not None) and chunk is not None:
                self._look(trainer, pl_module, chunk)
        self._call.forget()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        warn_of_idle_average(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._call.forget()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._call.forget()

    def _begin(self, world_size: int) -> None:
        """Forget what was seen: a new training begins."""
        self.look: Look | None = None
        self.metrics: dict[str, float] = {}
        self.causes: list[str] = []
        self._on = self._synchronized = False
        self._looks = self._fallbacks = 0
        self._interval = min(_COMPARED, self.every_n_steps)
        self._until_look = self._interval
        self._inspector: Inspector = Inspector(world_size)
        self._membership, self._kept, self._images_since = Membership(), 0, 0
        self._p_values: list[float] = []
        self._labels: Tensor | None = None
        self._label_numbers = LabelNumbers()
        self._other: Chunk | None = None
        self._said: set[str] = set()

    @property
    def _stride(self) -> int:
        """How many batches lie between two of which something is kept."""
        return max(1, self._interval // _COMPARED)

    def _keep(self, batch: Any) -> None:
        """Keep of a batch what the next look compares it by."""
        chunk = self._call.chunk
        if chunk is None:
            self._warn(
                "no call",
                "the training step did not call the network, or a compiled one, which does not let itself be watched: "
                "pass module=, the path of the part that is called and holds the BatchNorm layers",
            )
            return
        self._labels = self._find_labels(batch, len(chunk))
        if self._labels is not None:
            self._inspector.counts.add(self._labels)
        numbered = Chunk(chunk.content, (self._kept,) * len(chunk), chunk.position)
        self._membership.see(numbered)
        self._kept += 1
        if 0 < self._until_look <= self._stride and self._leakage_is_due:
            self._other = chunk

    @property
    def _leakage_is_due(self) -> bool:
        return bool(self.leakage_every_n_looks) and self._looks % self.leakage_every_n_looks == 0

    def _find_labels(self, batch: Any, images: int) -> Tensor | None:
        try:
            labels = labels_of(self._label_numbers.numbered(batch), self.labels)
        except BadData:
            if self.labels is not None:
                allowed = "where a training batch holds one label an image"
                raise FinetuneBNError(complaint("labels", self.labels, allowed)) from None
            self._tell("there are no labels in the batch", "tell where they are by labels=")
            return None
        if len(labels) != images:
            self._tell(f"the network is called with {images} images, and there are {len(labels)} labels in the batch")
            return None
        return labels

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, chunk: Chunk) -> None:
        self._looks += 1
        before = self.look
        try:
            self.look = self._inspect(trainer, pl_module, chunk)
            self._agree_or_stop(trainer)
        except Exception as error:  # whatever a network raises in eval mode must not end its training
            if not isinstance(error, _FailedElsewhere):
                self._agree(trainer, False)
            self._on = False
            self._warn("error", f"a look failed, and there will be no more: {type(error).__name__}: {error}")
            return
        self.metrics = self.look.metrics(self.per_layer)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics(self.metrics, step=logged_step(trainer))
        for cause, sentence in advise(self.look, before):
            self._warn(cause, sentence)

    def _agree(self, trainer: pl.Trainer, mine: bool) -> bool:
        """Return what all processes say, beside SyncBatchNorm: its forward pass waits for theirs, so all make it."""
        return trainer.strategy.reduce_boolean_decision(mine) if self._synchronized else mine

    def _agree_or_stop(self, trainer: pl.Trainer) -> None:
        """Stop this look where that of another process failed; that one says so instead of coming here."""
        if not self._agree(trainer, True):
            raise _FailedElsewhere("in another process")

    def _inspect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, chunk: Chunk) -> Look:
        target, training = self._call.target, self._call.training
        assert target is not None
        sites = find_batch_norms(part_of(pl_module, self.module))

        def run(content: Any, as_in_training: bool = False) -> Any:
            for site in sites:
                site.module.training = as_in_training and training.get(site.module, False)
            args, kwargs = content
            with trainer.precision_plugin.forward_context():
                return target(*args, **kwargs)

        with self._aside(pl_module):
            inputs, in_eval = layer_inputs(sites, len(chunk), lambda: run(chunk.content))
            layers = tuple(
                self._inspector.judge(site, seen, self._labels, training.get(site.module, False))
                for site, seen in zip(sites, inputs, strict=True)
                if seen is not None
            )
            self._introduce(sites, layers, target, pl_module)
            p_value = self._p_value(lambda kept: run(kept.content), sites, layers)
            self._agree_or_stop(trainer)
            gap = output_gap(in_eval, run(chunk.content, as_in_training=True), len(chunk))
        leakage = self._leakage(trainer, pl_module, target, chunk, lambda content: run(content, as_in_training=True))
        return Look(
            images=len(chunk),
            layers=layers,
            p_value=p_value,
            p_value_so_far=fisher(self._p_values) if self._p_values else None,
            train_eval_gap=gap,
            leakage=leakage,
            labels=self._inspector.counts.labels,
            batches=self._inspector.counts.batches,
            single_value_batches=_fallbacks(sites) - self._fallbacks,
        )

    @contextlib.contextmanager
    def _aside(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """For the time of the block, the module has the statistics from before the training step, in copies."""
        with quietly(pl_module):  # which puts back what is changed here
            vars(pl_module)["log"] = _log_nothing
            for site in find_batch_norms(pl_module):
                buffers = site.module._buffers
                before = self._call.buffers.get(site.module, buffers)
                buffers.update({name: None if b is None else b.clone() for name, b in before.items()})
            yield

    def _p_value(
        self, run: Callable[[Chunk], Any], sites: list[BatchNormSite], layers: tuple[LayerLook, ...]
    ) -> float | None:
        """Return that of the batches since the last one; None where no layer normalizes by the batch.

        Not at each look where batches are small: it takes a pass of 24 images, which would be the most of its cost.
        """
        by_batch = {layer.name for layer in layers if layer.by_batch}
        watched = [site.module for site in sites if site.names[0] in by_batch]
        self._images_since += layers[0].images if watched else 0
        if self._p_values and self._images_since < 2 * _COMPARED:
            return None
        p_value = self._membership.p_value(run, watched) if watched else None
        if p_value is not None:
            self._p_values.append(p_value)
        self._membership, self._kept, self._images_since = Membership(), 0, 0
        return p_value

    def _leakage(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        target: nn.Module,
        chunk: Chunk,
        run: Callable[[Any], Any],
    ) -> Leakage | None:
        other, self._other = self._other, None
        if self.every_n_steps == 1:
            self._other = chunk
        images = 0 if other is None else min(len(chunk), len(other))
        alike = other is not None and chunk.shape_key is not None and chunk.shape_key == other.shape_key
        if other is not None and (images < 2 or not alike):
            self._tell("leakage is not tested", "it takes two batches of images of one shape, two or more each")
        self._agree_or_stop(trainer)
        if not self._agree(trainer, images >= 2 and alike) or other is None:
            return None
        with self._aside(pl_module):
            return measure_leakage(
                target, chunk[:images].content, other[:images].content, forward=lambda _, content: run(content)
            )

    def _introduce(
        self,
        sites: list[BatchNormSite],
        layers: tuple[LayerLook, ...],
        target: nn.Module,
        pl_module: pl.LightningModule,
    ) -> None:
        """Say what is looked at, and what is not."""
        seen = {layer.name for layer in layers}
        missing = [site.names[0] for site in sites if site.names[0] not in seen]
        name = next((name for name, module in pl_module.named_modules() if module is target), "")
        alone = f"; left alone: {', '.join(missing)} (not called with a row an image)" if missing else ""
        self._tell(
            f"looks at {len(layers)} BatchNorm layers of {name or type(target).__name__} every {self.every_n_steps} "
            f"batches{alone}"
        )

    def _tell(self, *said: str) -> None:
        """Say once what is no cause for concern."""
        if said[0] not in self._said:
            self._said.add(said[0])
            rank_zero_info(f"BatchNormMonitor: {': '.join(said)}.")

    def _warn(self, cause: str, sentence: str) -> None:
        """Warn, once a training for each cause."""
        if cause not in self.causes:
            self.causes.append(cause)
            rank_zero_warn(f"BatchNormMonitor: {sentence.rstrip('.')}.")


class _FailedElsewhere(Exception):
    """The look of another process failed."""


def _fallbacks(sites: list[BatchNormSite]) -> int:
    """Return in how many batches a layer had one value a channel, where layers count that."""
    counted = [site.module.num_fallbacks for site in sites if isinstance(site.module, TrackingBatchNorm)]
    return max((int(number) for number in counted), default=0)


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Take the place of `log` while the network is looked at: nobody asked it to log that."""
