"""Tell classes of images apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from typing_extensions import override

from finetune_bn.callbacks.module import loader_names
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.functional.frozen import at_least_float32
from finetune_bn.tasks.base import TimmTask
from finetune_bn.tasks.checks import images_and_labels, images_of
from finetune_bn.utilities.checks import number

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


class ImageClassification(TimmTask):
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
        label_smoothing: Share of each label that is spread evenly over all classes, in the training loss.
    """

    test_confusion: MulticlassConfusionMatrix | None

    def __init__(
        self, num_classes: int, class_names: list[str] | None = None, *, label_smoothing: float = 0.0, **kwargs: Any
    ) -> None:
        number("num_classes", num_classes, least=2, whole=True)
        names = [str(i) for i in range(num_classes)] if class_names is None else list(class_names)
        if not len(names) == len(set(names)) == num_classes:
            allowed = f"{num_classes} different names (num_classes), or null"
            raise FinetuneBNError(complaint("class_names", class_names, allowed))
        number("label_smoothing", label_smoothing, least=0, below=1)
        super().__init__(**kwargs)
        self.num_classes, self.class_names = num_classes, names
        self.label_smoothing = label_smoothing
        self._build(num_classes)
        self.train_accuracy = _accuracy(num_classes)
        self.val_scores = self.test_scores = _Scores(num_classes, [])
        self.test_confusion = None

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = images_and_labels(batch, batch_idx, self.num_classes)
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
        return at_least_float32(self(images_of(batch))).softmax(dim=1)

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        self.val_scores = self._scores(len(self.trainer.num_val_batches))

    @override
    def on_test_start(self) -> None:
        super().on_test_start()
        self.test_scores = self._scores(len(self.trainer.num_test_batches))
        self.test_confusion = None
        if self.num_classes <= CONFUSION_UP_TO:
            confusion = MulticlassConfusionMatrix(self.num_classes, validate_args=False)
            self.test_confusion = confusion.to(self.device)

    @override
    def on_validation_epoch_end(self) -> None:
        self._report("val", self.val_scores)

    @override
    def on_test_epoch_end(self) -> None:
        self._report("test", self.test_scores)
        if self.test_confusion is not None:
            # Every rank is here now, and the metric keeps what it has computed: a callback may ask on one rank later.
            self.test_confusion.compute()

    def _scores(self, loaders: int) -> _Scores:
        return _Scores(self.num_classes, loader_names(self.trainer, loaders), self.device)

    def _evaluate(self, scores: _Scores, batch: Any, batch_idx: int, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = images_and_labels(batch, batch_idx, self.num_classes)
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
